"""What an exported model takes along of its training besides weights."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_psft.data.chat import ChatRenderer
from megatron_psft.data.dataset import TokenizedDataset
from megatron_psft.data.messages import RecordError
from megatron_psft.hf.side_files import SideFiles

_COMPARED_RECORDS, _COMPARED_TOKENS = 100, 2000


def side_files_of(
    model_folder: Path, tokenizer_folder: Path, tokenizer: PreTrainedTokenizerBase, dataset: TokenizedDataset
) -> SideFiles:
    """The files of a run's export; its tokenizer is compared on some of what is trained on, too."""
    examples = (dataset[index] for index in range(min(len(dataset), _COMPARED_RECORDS)))
    return SideFiles(
        model_folder=model_folder,
        tokenizer_folder=tokenizer_folder,
        tokenizer=tokenizer,
        texts=[str(tokenizer.decode(example.tokens[:_COMPARED_TOKENS].tolist())) for example in examples],
        stop_id=end_of_turn_id(tokenizer),
    )


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the token that a model of this chat template is taught to end its turn with, if there is one."""
    try:
        token = ChatRenderer(tokenizer, "assistant").end_of_turn()
    except RecordError:
        return None
    return tokenizer.get_vocab()[token]
