"""Weights by Megatron-Bridge's `AutoBridge`, which knows many families of models that this trainer does not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.bridge import AutoBridge
from megatron.bridge.training.model_load_save import temporary_distributed_context

from megatron_psft.atomic import aside
from megatron_psft.checkpoint.unpickle import DataReader
from megatron_psft.distributed.megatron_lines import read_with
from megatron_psft.errors import UserError


def import_weights(model_folder: Path, target: Path) -> None:
    """Writes Bridge's checkpoint of a Hugging Face folder, which `checkpoint.pretrained_checkpoint` of a recipe takes.
    Raises UserError for a model that Bridge does not know."""
    _check_model("from_hf", model_folder)
    with _aside(target) as folder, temporary_distributed_context(backend="gloo"):
        AutoBridge.import_ckpt(str(model_folder), str(folder))


def export_weights(checkpoint: Path, model_folder: Path, target: Path) -> None:
    """Writes the Hugging Face folder of a checkpoint of Bridge's, with config and tokenizer of `model_folder`. Raises
    UserError for a model that Bridge does not know."""
    _check_model("load_hf", model_folder)
    if not (checkpoint / "latest_checkpointed_iteration.txt").is_file():
        raise UserError(
            f"from_megatron ({checkpoint}) must be a folder of Megatron-Bridge's checkpoints; check the path"
        )
    with _aside(target) as folder, read_with(DataReader):
        AutoBridge.from_hf_pretrained(str(model_folder)).export_ckpt(str(checkpoint), str(folder), strict=True)


def _check_model(field: str, folder: Path) -> None:
    if not AutoBridge.can_handle(folder):
        raise UserError(f"{field} ({folder}) must be of a family that Megatron-Bridge knows; see its list of models")


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A folder to write in, which gets its name when it is complete."""
    with aside(target.resolve().parent, target.name) as folder:
        yield folder
        folder.rename(target)
