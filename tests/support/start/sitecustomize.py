"""What every Python that tests start does first, for its folder is on PYTHONPATH: no disk is waited for.

A checkpoint has each of its fifteen files written to the disk before it is sealed, at 0.1 s and more a file, thousands
of times in a suite. Who is killed loses nothing that it has handed to the system, and no test turns the machine off.
"""

import os


def _return_at_once(descriptor: int) -> None:
    os.fstat(descriptor)  # a file that is closed is an error all the same


os.fsync = os.fdatasync = _return_at_once
