# PYTHON_ARGCOMPLETE_OK: shells with argcomplete's global completion complete its flags
"""In a checkout, `python tools/evaluate.py FLAGS` is `psft evaluate FLAGS`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This folder hides another `evaluate`, which lm-eval imports.
    sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

from megatron_psft.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
