#!/usr/bin/env bash
# Installs what tests/nemo needs, but this package, into a virtual environment of Python 3.12:
#   tests/nemo/install.sh VENV/bin/python
set -euo pipefail
python=$1
here=$(cd "$(dirname "$0")" && pwd)

"$python" -m pip install -c "$here/constraints.txt" torch transformers \
    accelerate argcomplete av datasets diffusers einops hydra-core megatron-energon nvidia-modelopt omegaconf peft pillow psutil pyyaml \
    qwen-vl-utils regex rich tensorboard torchvision tqdm wandb \
    hypothesis math-verify matplotlib mlflow-skinny pytest pytest-xdist selenium trl
# Without what they require: Transformer Engine and nvidia-resiliency-ext have no build for a machine without CUDA, and
# cpu.py has stand-ins for them.
"$python" -m pip install --no-deps megatron-core==0.19.2 megatron-bridge==0.6.2
# In a folder that only the tests of its layers have on their path.
"$python" -m pip install --upgrade --no-deps --target "$("$python" -c 'import sys; print(sys.prefix)')/engine" \
    -r "$here/../model/engine/requirements.txt"
