"""What belongs to a model besides its weights: config, generation config, tokenizer, chat templates, processors."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from megatron_psft.hf.folder import CONFIG, GENERATION_CONFIG, NAMED_TEMPLATES, PROCESSOR_FILES, TOKENIZER_FILES
from megatron_psft.hf.tokenizer import TOKENIZER_CONFIG, settle_class

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SideFiles:
    """Where they come from, and what has changed in training."""

    model_folder: Path
    """Has config.json and, if any, generation_config.json."""
    tokenizer_folder: Path
    tokenizer: "PreTrainedTokenizerBase | None" = None
    """That which the exported one has to load as; not compared if None."""
    texts: Sequence[str] = ()
    """On which they are compared besides hard ones."""
    chat_template: str | None = None
    """The template trained with; the tokenizer's own if None."""
    stop_id: int | None = None
    """Of the token that the model was taught to end its turn with."""
    vocab_size: int | None = None
    """Rows of the embedding where some were added; those of config.json if None."""

    def write(self, folder: Path, dtype: torch.dtype) -> None:
        """Writes them into `folder`; config.json names `dtype`. Raises UserError where the tokenizer would load as
        another one."""
        config = json.loads((self.model_folder / CONFIG).read_text(encoding="utf-8"))
        text = config if config.get("text_config") is None else config["text_config"]  # the language model's fields
        # transformers 5 spells it `dtype`, transformers 4 reads only `torch_dtype`; both read the latter.
        for name in ("dtype", "torch_dtype"):
            text.pop(name, None)
        config.pop("dtype", None)
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
        if self.vocab_size is not None:
            text["vocab_size"] = self.vocab_size
        _write_json(folder / CONFIG, config)
        for pattern in (GENERATION_CONFIG, *PROCESSOR_FILES):
            _copy_files(self.model_folder, pattern, folder)
        if self.stop_id is not None:
            self._add_stop(folder / GENERATION_CONFIG, {**text, **config}, self.stop_id)
        for pattern in TOKENIZER_FILES:
            _copy_files(self.tokenizer_folder, pattern, folder)
        if self.chat_template is not None:
            _replace_template(folder, self.chat_template)
        if self.tokenizer is not None:
            settle_class(folder, self.tokenizer, self.texts)

    def _add_stop(self, path: Path, config: dict[str, Any], stop_id: int) -> None:
        """Adds `stop_id` to the ids at which generation stops; without the file, those of config.json count."""
        if path.is_file():
            generation = json.loads(path.read_text(encoding="utf-8"))
        else:
            generation = {
                name: config[name] for name in ("bos_token_id", "pad_token_id") if config.get(name) is not None
            }
        known = generation.get("eos_token_id", config.get("eos_token_id"))
        stops = known if isinstance(known, list) else [] if known is None else [known]
        if stop_id not in stops:
            generation["eos_token_id"] = [*stops, stop_id] if stops else stop_id
            _write_json(path, generation)
            token = stop_id if self.tokenizer is None else self.tokenizer.convert_ids_to_tokens(stop_id)
            others = f", besides {', '.join(map(str, stops))}" if stops else ""
            log.info("export: generation_config.json stops at %s (%d), which ends a turn%s", token, stop_id, others)

    def check(self) -> None:
        """Raises the errors of `write`, without the files."""
        with TemporaryDirectory() as folder:
            replace(self, stop_id=None).write(Path(folder), torch.float32)  # stop_id would be told of twice


def _replace_template(folder: Path, template: str) -> None:
    """Has the tokenizer of `folder` this one template, wherever its own were."""
    shutil.rmtree(folder / NAMED_TEMPLATES, ignore_errors=True)
    (folder / "chat_template.json").unlink(missing_ok=True)
    path = folder / TOKENIZER_CONFIG
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("chat_template", None) is not None:
            _write_json(path, config)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _copy_files(source: Path, pattern: str, target: Path) -> None:
    for path in source.glob(pattern):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
