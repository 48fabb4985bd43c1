"""What belongs to a model besides its weights: config, generation config, tokenizer and chat templates."""

import json
import shutil
from pathlib import Path

import torch

from megatron_psft.hf.folder import CONFIG, MODEL_FILES, TOKENIZER_FILES


def copy_side_files(target: Path, model_folder: Path, tokenizer_folder: Path, dtype: torch.dtype) -> None:
    """Copies what belongs to a model besides its weights; its config names `dtype`."""
    config = json.loads((model_folder / CONFIG).read_text(encoding="utf-8"))
    # transformers 5 spells it `dtype`, transformers 4 reads only `torch_dtype`; both read the latter.
    config.pop("dtype", None)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for folder, patterns in ((model_folder, MODEL_FILES), (tokenizer_folder, TOKENIZER_FILES)):
        for pattern in patterns:
            for path in folder.glob(pattern):
                copy = target / path.relative_to(folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
