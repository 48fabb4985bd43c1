# PYTHON_ARGCOMPLETE_OK: shells with argcomplete's global completion complete its flags
"""In a checkout, `python tools/show_data.py FLAGS` is `psft data FLAGS`."""

import sys

from megatron_psft.cli.data import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
