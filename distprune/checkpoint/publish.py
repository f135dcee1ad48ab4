"""From a working folder to a finished checkpoint that becomes visible by one rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from distprune.checkpoint.durable import sync, sync_tree
from distprune.checkpoint.layout import CONFIG_FILE
from distprune.errors import InputError

# Seconds within which whoever asks `is_locked` has let go of the lock again.
GLANCE = 1.0


def partial_directory(output: Path) -> Path:
    """Where a run works until its output is finished: `OUTPUT.partial`, beside the output."""
    output = Path(os.path.abspath(output))
    return output.with_name(f"{output.name}.partial")


def prepare_output(output: Path, overwrite: bool) -> None:
    """Make the output's parent folder, and raise InputError where the output can't be put.

    An existing folder is accepted only with `overwrite`, and then only if it is empty or holds a config.json:
    a folder that is not a checkpoint is never removed.
    """
    output = Path(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output.parent} can't be made ({error.strerror}). Choose another output.") from error
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise InputError(f"{output.parent} can't be written to. Choose another output, or change its permissions.")
    if not os.path.lexists(output):
        return
    if output.is_symlink() or not output.is_dir():
        raise InputError(f"{output} exists and is not a folder. Choose another output.")
    if not overwrite:
        raise InputError(f"{output} exists. Choose another output, or allow overwriting it.")
    if any(output.iterdir()) and not (output / CONFIG_FILE).is_file():
        raise InputError(
            f"{output} is not overwritten: it holds files but no config.json, so it is not a checkpoint. "
            "Choose another output, or remove the folder yourself."
        )


def publish(partial: Path, output: Path, overwrite: bool) -> None:
    """Make the finished folder `partial` visible as `output`, by one rename on one file system.

    An old output is first moved aside to `OUTPUT.replaced-*`, put back if the rename fails, and then removed.
    """
    output = Path(os.path.abspath(output))
    prepare_output(output, overwrite)
    sync_tree(partial)
    if not output.exists():
        os.rename(partial, output)
    else:
        _replace_folder(partial, output)
    sync(output.parent)


@contextmanager
def hold_lock(partial: Path) -> Iterator[None]:
    """Let only one run at a time work in `partial`; InputError where another one does."""
    lock_file = partial.with_name(f"{partial.name}.lock")
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_file, timeout=GLANCE)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another run is writing to {partial}. Wait for it to end, or choose another output."
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            lock_file.unlink()  # while still held, so that no other run's lock can be the one removed
        lock.release()


def is_locked(partial: Path) -> bool:
    """Whether a run is at work in `partial` now."""
    lock_file = partial.with_name(f"{partial.name}.lock")
    if not lock_file.exists():
        return False
    lock = FileLock(lock_file, timeout=0)
    try:
        with lock:
            return False
    except Timeout:
        return True


def _replace_folder(partial: Path, output: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f"{output.name}.replaced-", dir=output.parent))
    old = aside / output.name
    os.rename(output, old)
    try:
        os.rename(partial, output)
    except BaseException:
        os.rename(old, output)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
