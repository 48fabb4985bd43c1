# PYTHON_ARGCOMPLETE_OK: shells with argcomplete's global completion complete its flags
"""In a checkout, `python tools/rollout.py FLAGS` is `psft rollout FLAGS`."""

import sys

from megatron_psft.cli.rollout import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
