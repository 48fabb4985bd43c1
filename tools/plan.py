# PYTHON_ARGCOMPLETE_OK: shells with argcomplete's global completion complete its flags
"""In a checkout, `python tools/plan.py FLAGS` is `psft plan FLAGS`."""

import sys

from megatron_psft.cli.plan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
