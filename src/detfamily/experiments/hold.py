"""That one process alone is at a run folder, on this machine and on others that see the folder.

On one machine ``flock`` says so for certain: the run's own process inherits it, and it ends with the last process that
has it. It need not reach other machines, so a lease lies beside it: a file whose owner renews its date, and which
counts for nothing once it has not been renewed for ``STALE`` seconds. Dates are those that the file system gives, so
clocks that differ do no harm.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from detfamily.errors import DataError
from detfamily.files import read_json, write_text_atomically

try:
    import fcntl
except ImportError:  # not on Windows; there, only the lease keeps two calls apart
    fcntl = None  # type: ignore[assignment]

LOCK, LEASE = ".lock", ".lease"
BEAT = 15.0  # seconds between two renewals
STALE = 90.0  # seconds without renewal after which the owner is taken for dead
SETTLE = 1.0  # seconds after which a lease that was taken from another machine is looked at again


def _machine() -> str:
    """What processes have in common that see each other's ``flock``: the kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


MACHINE = _machine()


class Hold:
    """Of a run folder. Made by ``take``.

    Attributes:
        folder: that is held.
        handle: file descriptor of the lock, for a process to inherit.
        lost: another machine has taken over.
    """

    def __init__(self, folder: Path, handle: int, token: str) -> None:
        self.folder, self.handle, self.token = folder, handle, token
        self.lost = False
        self._renewed = time.monotonic()

    @classmethod
    def take(cls, folder: Path, patience: float = 0.0) -> Hold | None:
        """Hold a folder.

        Args:
            folder: exists.
            patience: seconds to wait for whoever is at it.

        Returns:
            None where another process is, and stays, at it.
        """
        until = time.monotonic() + patience
        while (hold := cls._try(folder)) is None and time.monotonic() < until:
            time.sleep(0.2)
        return hold

    @classmethod
    def _try(cls, folder: Path) -> Hold | None:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        locked = _lock(handle)
        before = _lease(folder)
        if locked is False or _counts(folder, handle, before, locked):
            os.close(handle)
            return None
        token = uuid.uuid4().hex
        content = {"machine": MACHINE, "host": socket.gethostname(), "pid": os.getpid(), "token": token}
        write_text_atomically(folder / LEASE, json.dumps(content) + "\n")
        if locked is None or before.get("machine", MACHINE) != MACHINE:
            time.sleep(SETTLE)  # two machines may have found the same dead lease; the last one to write has it
            if _lease(folder).get("token") != token:
                os.close(handle)
                return None
        return cls(folder, handle, token)

    def beat(self) -> bool:
        """Renew the lease, when it is time; False once another machine has taken over."""
        if self.lost or time.monotonic() - self._renewed < BEAT:
            return not self.lost
        self._renewed = time.monotonic()
        owner = _lease(self.folder).get("token")
        self.lost = owner not in (None, self.token)
        if owner == self.token:
            # Where the file system is away for a moment: the lease lasts longer than a beat.
            with contextlib.suppress(OSError):
                os.utime(self.folder / LEASE)
        return not self.lost

    def release(self) -> None:
        """Let go. A child that has inherited the lock keeps it for as long as it lives."""
        if self.handle < 0:
            return
        if _lease(self.folder).get("token") == self.token:
            (self.folder / LEASE).unlink(missing_ok=True)
        os.close(self.handle)
        self.handle = -1


def is_held(folder: Path) -> bool:
    """Whether a process is at a folder, here or elsewhere."""
    if not folder.is_dir():
        return False
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        locked = _lock(handle)
        return locked is False or _counts(folder, handle, _lease(folder), locked)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Whether the lock was to be had; None where the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _lease(folder: Path) -> dict[str, Any]:
    try:
        found = read_json(folder / LEASE)
    except DataError:
        return {}
    return found if isinstance(found, dict) else {}


def _counts(folder: Path, handle: int, lease: dict[str, Any], locked: bool | None) -> bool:
    """Whether a lease stands for somebody who is at the folder."""
    if not lease or (locked and lease.get("machine") == MACHINE):  # of this machine's processes the lock knows better
        return False
    try:
        os.utime(handle)  # the file system's own clock
        return os.fstat(handle).st_mtime - (folder / LEASE).stat().st_mtime < STALE
    except OSError:
        return False
