"""What an exported model takes along of its training besides weights."""

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_psft.config.inputs import DataConfig
from megatron_psft.data.chat import ChatRenderer, RenderSettings
from megatron_psft.data.dataset import TokenizedDataset
from megatron_psft.data.messages import RecordError
from megatron_psft.data.template import template_texts
from megatron_psft.hf.side_files import SideFiles
from megatron_psft.hf.tokenizer import needed_rows
from megatron_psft.model.shape import ModelShape

_COMPARED_RECORDS, _COMPARED_TOKENS = 100, 2000


def side_files_of(
    config: DataConfig,
    model_folder: Path,
    tokenizer_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    dataset: TokenizedDataset,
    *,
    vocab_size: int | None,
) -> SideFiles:
    """The files of a run's export; its tokenizer is compared on some of what is trained on, too. `vocab_size` is None
    where it is that of `model_folder`."""
    settings = RenderSettings.of_data(config)
    examples = (dataset[index] for index in range(min(len(dataset), _COMPARED_RECORDS)))
    return SideFiles(
        model_folder=model_folder,
        tokenizer_folder=tokenizer_folder,
        tokenizer=tokenizer,
        texts=[str(tokenizer.decode(example.tokens[:_COMPARED_TOKENS].tolist())) for example in examples],
        chat_template=settings.chat_template,
        stop_id=end_of_turn_id(tokenizer, settings),
        vocab_size=vocab_size,
    )


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, settings: RenderSettings) -> int | None:
    """Id of the token that a model of this chat template is taught to end its turn with, if there is one."""
    if settings.chat_template is None and "default" not in template_texts(tokenizer):
        return None
    try:
        token = ChatRenderer(tokenizer, "assistant", settings).end_of_turn()
    except RecordError:
        return None
    return tokenizer.get_vocab()[token]


def resized_shape(shape: ModelShape, tokenizer: PreTrainedTokenizerBase) -> ModelShape:
    """The shape with a row of the embedding for each id of the tokenizer."""
    return replace(shape, vocab_size=max(shape.vocab_size, needed_rows(tokenizer)))
