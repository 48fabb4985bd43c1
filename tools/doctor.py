# PYTHON_ARGCOMPLETE_OK: shells with argcomplete's global completion complete its flags
"""In a checkout, `python tools/doctor.py FLAGS` is `psft doctor FLAGS`."""

import sys

from megatron_psft.cli.doctor import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
