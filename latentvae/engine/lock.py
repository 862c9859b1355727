"""Lock the folder of a run, so that no two runs use the folder at the same time.

The lock ends when its process ends, so a dead process never leaves a locked folder behind.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from latentvae.distributed import from_main, is_main
from latentvae.errors import UserError

LOCK_NAME = "run.lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` inside this context, so that no other run can use it.

    A missing folder is created.

    Rank 0 holds the lock for all ranks. The lock is a POSIX record lock, which the operating system
    releases when the process ends in any way. Processes that load data do not inherit the lock. On
    network file systems the lock also keeps runs on other machines out. Windows has no such locks,
    so on Windows nothing is locked.

    Raises:
        UserError: another run holds the lock, or the folder cannot be written. Every rank raises
            the error.
    """
    # take the lock on rank 0, and send the result to all ranks
    descriptor, fault, is_new = None, None, not folder.exists()
    if is_main():
        try:
            descriptor = _take(folder)
        except UserError as error:
            fault = error
    fault = from_main(fault)
    if fault is not None:
        raise fault

    # the run, then the release
    try:
        yield
    finally:
        if descriptor is not None:
            _release(descriptor, folder)
            if is_new:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # fails if the folder is not empty


def _release(descriptor: int, folder: Path) -> None:
    with contextlib.suppress(OSError):  # an error of the disk was reported before
        (folder / LOCK_NAME).unlink(missing_ok=True)
    os.close(descriptor)


def _take(folder: Path) -> int | None:
    """Lock the folder, and write this process's id and host into the lock file.

    Return the open lock file's descriptor, or None on Windows.
    """
    path = folder / LOCK_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(path)
        if descriptor is not None:
            me = {"process": os.getpid(), "host": socket.gethostname()}
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(me).encode())
    except FileExistsError as error:
        raise UserError(f"output_dir '{folder}' is a file. Give a folder.") from error
    except OSError as error:
        raise UserError(f"output_dir '{folder}' cannot be written: {error.strerror}") from error
    return descriptor


def _open_locked(path: Path) -> int | None:
    """Open and lock a file. Return its descriptor, or None on Windows, which lacks POSIX locks.

    Raises:
        UserError: another process holds the lock.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        return None

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 4096)
            os.close(descriptor)
            raise UserError(
                f"output_dir '{path.parent}' is in use{_by(holder)}. Wait until that run has "
                "ended, or give another output_dir."
            ) from error
        if _is_still(path, descriptor):  # the previous run has not deleted the file meanwhile
            return descriptor
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _by(holder: bytes) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        values = json.loads(holder)
        return f" by process {int(values['process'])} on {values['host']}"
    return " by another run"
