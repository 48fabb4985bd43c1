"""One writer of a folder at a time, on this host or another: a lock that says who holds it.

The lock is a file with host, process and time. Its holder keeps a `flock` on it, which the kernel gives up however the
holder ends, and touches it every 30 seconds. A process of this host that is gone holds nothing. What another host has
locked is free 10 minutes after the last touch, by the clock of the file system, as not every file system shares locks
between hosts; some have none, and there the file's content decides alone. A holder that finds another's name in its
lock ends at once.
"""

import fcntl
import json
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_psft.errors import InfrastructureError, UserError, counted, folder_error

BEAT_SECONDS = 30.0
"""Between two touches. The first come sooner: they find out whether another has taken the lock at the same moment."""
STALE_SECONDS = 600.0
"""After the last touch, what another host has locked is free."""
LEFT_BEHIND_SECONDS = 15.0
"""How long the processes of a killed holder may take to end; they hold its lock."""

_EXIT_LOST = 2


def lock_within(folder: Path) -> Path:
    """The lock of a folder that its writer adds to."""
    return folder / ".lock"


def lock_beside(folder: Path) -> Path:
    """The lock of a folder that appears, or is replaced, as a whole."""
    return folder.absolute().parent / f".{folder.absolute().name}.lock"


@contextmanager
def sole_writer(field: str, folder: Path, lock: Path, *, steal: bool | None = None) -> Iterator[None]:
    """Within this context no other process of this package writes to a folder.

    Args:
        field: of the configuration, that names the folder.
        folder: to be written to.
        lock: its lock: `lock_within` or `lock_beside` it. It is made, with its folder, and is gone afterwards; so are
            that folder and those above it that were made for it, if nothing was written to them.
        steal: whether to take what a process of another host holds without waiting for its signs of life to end; None
            where the user has no such choice.

    Raises:
        UserError: another process writes to the folder, or the lock cannot be made.
        InfrastructureError: a process of another host, which may be gone, so that a later start may do better.
    """
    with _made(lock.parent):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            held = _acquire(lock, steal=bool(steal))
        except OSError as error:
            raise folder_error(field, folder, error) from None
        if isinstance(held, _Refusal):
            kind = UserError if held.idle_seconds is None else InfrastructureError
            raise kind(f"{field} ({folder}) is in use: {held.text(can_steal=steal is not None)}")
        try:
            with held.touched(f"{field} ({folder})"):
                yield
        finally:
            held.release()


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Of `folder` and those above it, what is made within this context and empty at its end is gone then."""
    absent = [each for each in (folder, *folder.parents) if not os.path.exists(each)]
    try:
        yield
    finally:
        for each in absent:
            with suppress(OSError):  # something was written
                each.rmdir()


@dataclass(frozen=True, kw_only=True)
class _Holder:
    """Who holds a lock, as its file says."""

    host: str
    pid: int
    started: str
    """When the process took the lock, in UTC."""
    kernel: str
    """Tells this boot of this host from others, also from hosts of the same name."""
    pids: str
    """The namespace in which `pid` counts: each container may have its own."""
    ticks: int
    """When the process began, in clock ticks since the kernel did: pids are used again."""
    token: str
    """No two holders share it."""

    @classmethod
    def new(cls) -> "_Holder":
        """This process, about to take a lock."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            kernel=_kernel(),
            pids=_pids(),
            ticks=_start_of(os.getpid()) or 0,
            token=secrets.token_hex(8),
        )

    @classmethod
    def read(cls, data: bytes) -> "_Holder | None":
        """From the content of a lock; None where there is none yet, or it is not ours."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None

    def write(self, descriptor: int) -> None:
        data = json.dumps(asdict(self)).encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, data, 0)
        os.fsync(descriptor)

    @property
    def shares_kernel(self) -> bool:
        return self.kernel == _kernel()

    @property
    def is_visible(self) -> bool:
        """Whether this process could see whether the holder lives."""
        return self.shares_kernel and self.pids == _pids()

    @property
    def is_alive(self) -> bool:
        return _start_of(self.pid) == self.ticks


@dataclass(frozen=True, kw_only=True)
class _Refusal:
    """Why a lock cannot be had."""

    holder: _Holder | None
    is_left_behind: bool = False
    """Whether the holder is dead, and processes that it has started are not."""
    idle_seconds: float | None = None
    """Since the holder's last sign of life, where nothing else is known of it."""

    def text(self, *, can_steal: bool) -> str:
        if self.holder is None:
            return "another process has just begun to write to it; wait for it"
        who = f"process {self.holder.pid} on {self.holder.host} has been writing to it since {self.holder.started}"
        if self.is_left_behind:
            return f"{who} and is gone, but processes that it has started are not; end them"
        if self.idle_seconds is None:
            return f"{who}; wait for it, or end it"
        how = ", or at once with --steal-lock" if can_steal else ""
        return (
            f"{who}; its last sign of life is {counted(self.idle_seconds, 'second', '.0f')} old. Wait for it, or "
            f"end it; if it is gone, the folder is free {STALE_SECONDS / 60:.0f} minutes after that sign{how}"
        )


class _Held:
    """A lock that this process holds."""

    def __init__(self, path: Path, descriptor: int, holder: _Holder) -> None:
        self._path, self._descriptor, self._holder = path, descriptor, holder

    @contextmanager
    def touched(self, what: str) -> Iterator[None]:
        """Shows within this context that the holder lives."""
        ends = threading.Event()
        thread = threading.Thread(target=self._touch, args=(what, ends), daemon=True, name="lock")
        thread.start()
        try:
            yield
        finally:
            ends.set()
            thread.join()

    def release(self) -> None:
        with suppress(OSError):  # where the file stays, it names a process that is gone
            if self._is_ours():
                self._path.unlink()
        os.close(self._descriptor)

    def _touch(self, what: str, ends: threading.Event) -> None:
        seconds = 1.0
        while not ends.wait(seconds):
            seconds = min(2 * seconds, BEAT_SECONDS)
            # A file server that does not answer now may do so later, and what was removed is not there again.
            with suppress(OSError):
                if self._is_ours():
                    os.utime(self._path)
                    continue
                with suppress(OSError):  # nobody may read it any more
                    sys.stderr.write(f"error: {what} was taken over by another process; this one writes no more\n")
                    sys.stderr.flush()
                os._exit(_EXIT_LOST)  # every other way out might write

    def _is_ours(self) -> bool:
        """Raises FileNotFoundError where the lock is not there."""
        return _Holder.read(self._path.read_bytes()) == self._holder


def _acquire(path: Path, *, steal: bool) -> _Held | _Refusal:
    deadline = time.monotonic() + LEFT_BEHIND_SECONDS
    while True:
        descriptor, is_kept = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), False
        try:
            is_free = _flock(descriptor)
            holder = _Holder.read(os.pread(descriptor, 1 << 16, 0))
            if not _is_at(path, descriptor):  # its holder has just released it
                continue
            refusal = _refusal(path, holder, is_free, steal=steal)
            if refusal is None and is_free:
                mine = _Holder.new()
                mine.write(descriptor)
                is_kept = True
                return _Held(path, descriptor, mine)
            if refusal is None and (held := _replace(path)) is not None:
                return held
            if refusal is not None and (not _may_end(refusal) or time.monotonic() > deadline):
                return refusal
        finally:
            if not is_kept:
                os.close(descriptor)
        time.sleep(0.1)


def _refusal(path: Path, holder: _Holder | None, is_free: bool | None, *, steal: bool) -> _Refusal | None:
    """Why a lock cannot be had, if so. `is_free`: of a `flock`, as far as this kernel knows; None where the file system
    has none."""
    if holder is None:
        return _Refusal(holder=None) if is_free is False else None
    if holder.shares_kernel and is_free is not None:
        if is_free:
            return None
        return _Refusal(holder=holder, is_left_behind=holder.is_visible and not holder.is_alive)
    if holder.is_visible:
        return _Refusal(holder=holder) if holder.is_alive else None
    idle_seconds = _idle_seconds(path)
    return None if steal or idle_seconds > STALE_SECONDS else _Refusal(holder=holder, idle_seconds=idle_seconds)


def _may_end(refusal: _Refusal) -> bool:
    """Whether the reason is one of the next seconds."""
    return refusal.holder is None or refusal.is_left_behind


def _replace(path: Path) -> _Held | None:
    """Puts a lock of our own into the place of one that cannot be had, or of a file system that has none. None where
    another has done the same since."""
    mine = _Holder.new()
    staging = path.with_name(f"{path.name}.{mine.token}")
    descriptor = os.open(staging, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    _flock(descriptor)
    mine.write(descriptor)
    staging.rename(path)
    time.sleep(1)  # the last one has it: whoever was about to do the same has done it by now
    if _is_at(path, descriptor):
        return _Held(path, descriptor, mine)
    os.close(descriptor)
    return None


def _flock(descriptor: int) -> bool | None:
    """True: we have it. False: another has it. None: there are no locks here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _idle_seconds(path: Path) -> float:
    """Since a file was touched, by the clock that says when: a file server's may not be ours."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.") as probe:
        return os.fstat(probe.fileno()).st_mtime - path.stat().st_mtime


def _kernel() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not every sandbox shows it
        return socket.gethostname()


def _pids() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_of(pid: int) -> int | None:
    """When a process began, in clock ticks since the kernel did; None where there is no such one that runs."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *rest = stat.rpartition(b")")[2].split()
    return None if state == b"Z" else int(rest[18])
