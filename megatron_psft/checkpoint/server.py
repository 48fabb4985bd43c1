"""What the server that background writers are forked from imports first: from then on it ends with the trainer, also
while it imports the rest for seconds, when it looks for nothing else."""

import multiprocessing
import signal

from megatron_psft.distributed.orphans import signal_with_parent

if getattr(multiprocessing.current_process(), "_inheriting", False):  # in the server, and nowhere else
    signal_with_parent(signal.SIGKILL)
    from megatron_psft.distributed.megatron_import import import_megatron

    import_megatron()  # of which the rest imports parts
