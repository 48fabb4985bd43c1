# PYTHON_ARGCOMPLETE_OK: shells with argcomplete's global completion complete its flags
"""In a checkout, `torchrun --nproc-per-node N pretrain_psft.py FLAGS`; elsewhere `torchrun -m megatron_psft FLAGS`."""

import sys

from megatron_psft.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
