"""`torchrun -m megatron_psft` and `python -m megatron_psft`: the command `psft`."""

import sys

from megatron_psft.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
