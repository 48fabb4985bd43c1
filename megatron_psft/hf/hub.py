"""Turns `DIR|ID` into a local folder."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from megatron_psft.config.paths import PathText
from megatron_psft.errors import UserError, first_line
from megatron_psft.hf.folder import CONFIG
from megatron_psft.hf.tokenizer import as_its_file, check_rows
from megatron_psft.model.shape import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_TEXT_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
_WEIGHT_FILES = ["*.safetensors"]  # pickled weights are not even downloaded


def model_folder(field: str, name: str, *, with_weights: bool) -> Path:
    """Returns the folder `name`, or the local copy of the hub repository of that name.

    Args:
        field: of the configuration, for errors.
        name: a folder, or a hub ID such as `Qwen/Qwen2.5-7B`.
        with_weights: whether a download includes the weights.

    Raises:
        UserError: `name` is neither.
    """
    path = Path(os.path.expanduser(name))  # where pathlib raises, as for the home of nobody, this leaves the name
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{field} ({name}) must be an existing folder or a hub ID; check the path")
    try:
        patterns = _TEXT_FILES + (_WEIGHT_FILES if with_weights else [])
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, HFValidationError, OSError) as error:
        reason = first_line(error)
        raise UserError(f"{field} ({name}) is no local folder and the hub has no answer for it: {reason}") from None


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a folder, with the tokens that its tokenizer.json says, and logs where transformers would
    make others. Raises UserError where there is none."""
    tokenizer, difference = read_tokenizer(folder)
    if difference is not None:
        log.warning(
            "tokenizer (%s): %s of transformers would not make the tokens of its tokenizer.json, which are used: %s",
            *(folder, *difference),
        )
    return tokenizer


def read_tokenizer(folder: Path) -> tuple["PreTrainedTokenizerBase", tuple[str, str] | None]:
    """As `load_tokenizer`, with transformers' class that would make other tokens and how they differ, if it would."""
    from transformers import AutoTokenizer  # seconds, which a mistaken name does not cost

    try:
        # Said, as transformers would ask on the terminal whether to run code that the folder brings.
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer, how = as_its_file(folder, loaded)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"tokenizer ({folder}) must be a folder with a Hugging Face tokenizer: {reason}") from None
    return tokenizer, None if how is None else (type(loaded).__name__, how)


def embedding_rows(folder: Path) -> int | None:
    """How many rows the config.json of a model's folder gives the embedding; None where it does not say."""
    if not (folder / CONFIG).is_file():
        return None
    config = read_config(folder)
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    rows = config.get("vocab_size") if isinstance(config, dict) else None
    return rows if isinstance(rows, int) else None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Hugging Face model and its tokenizer."""

    model: PathText
    """Hugging Face folder, as --export-hf writes it, or hub ID."""
    tokenizer: PathText | None = None
    """Folder or hub ID of the tokenizer and its chat template; `model` if unset."""

    def folder(self) -> Path:
        """The model's folder. Raises UserError where it has none."""
        return model_folder("model", self.model, with_weights=True)

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Raises UserError where there is none, or one from elsewhere has ids that the model has no row for."""
        if self.tokenizer is None:  # published models have ids without a row, of tokens that no text has
            return load_tokenizer(model_folder("tokenizer", self.model, with_weights=False))
        tokenizer = load_tokenizer(model_folder("tokenizer", self.tokenizer, with_weights=False))
        rows = embedding_rows(self.folder())
        if rows is not None:
            check_rows(tokenizer, rows)
        return tokenizer
