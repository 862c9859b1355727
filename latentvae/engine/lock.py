"""One run per folder: a lock that dies with its process, so none is ever stale."""

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
    """Keep every other run out of ``folder``, which is made if it is not there; rank 0 holds the
    lock for all ranks.

    It is a POSIX record lock: the system releases it when the process ends, however it does;
    reader processes do not inherit it; network file systems pass it between machines.

    Raises:
        UserError: another run holds it, or the folder cannot be written; on every rank.
    """
    descriptor, fault, is_new = None, None, not folder.exists()
    if is_main():
        try:
            descriptor = _take(folder)
        except UserError as error:
            fault = error
    fault = from_main(fault)
    if fault is not None:
        raise fault
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):  # a disk that went away has said so before
                (folder / LOCK_NAME).unlink(missing_ok=True)
            os.close(descriptor)
            if is_new:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # nothing was written


def _take(folder: Path) -> int | None:
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return None
    path = folder / LOCK_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(descriptor, 4096)
                os.close(descriptor)
                raise UserError(
                    f"output_dir '{folder}' is in use{_by(holder)}; wait until it has ended, or "
                    "give another output_dir"
                ) from error
            if _is_still(path, descriptor):  # not deleted by its last holder in between
                break
            os.close(descriptor)
        me = {"process": os.getpid(), "host": socket.gethostname()}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(me).encode())
    except FileExistsError as error:
        raise UserError(f"output_dir '{folder}' is a file; give a folder") from error
    except OSError as error:
        raise UserError(f"output_dir '{folder}' cannot be written: {error.strerror}") from error
    return descriptor


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
