# PYTHON_ARGCOMPLETE_OK: shells with argcomplete's global completion complete its flags
"""In a checkout, `python tools/plot_run.py FLAGS` is `psft plot FLAGS`."""

import sys

from megatron_psft.cli.plot import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
