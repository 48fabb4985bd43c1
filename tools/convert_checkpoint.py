# PYTHON_ARGCOMPLETE_OK: shells with argcomplete's global completion complete its flags
"""In a checkout, `python tools/convert_checkpoint.py FLAGS` is `psft convert FLAGS`."""

import sys

from megatron_psft.cli.convert import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
