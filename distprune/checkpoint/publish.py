"""From a working folder to a finished checkpoint that becomes visible by one rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from upath import UPath

from distprune.checkpoint.durable import sync, sync_tree, write_text
from distprune.checkpoint.layout import CONFIG_FILE
from distprune.checkpoint.lease import Held, hold_lease, is_held
from distprune.errors import InputError
from distprune.storage import files_in, is_remote, objects_in, remove_tree

# Seconds within which whoever asks `is_locked` has let go of the lock again.
GLANCE = 1.0
# In a run's work folder in an object store: its result is being copied to the output, and has been.
BEGUN, PUBLISHED = "publishing", "published"


def partial_directory(output: Path | UPath) -> Path | UPath:
    """Where a run works until its output is finished: `OUTPUT.partial`, beside the output.

    InputError: the output is a whole bucket of an object store, beside which nothing can be.
    """
    if not is_remote(output):
        output = Path(os.path.abspath(output))
    elif "/" not in output.path.strip("/"):
        raise InputError(f"{output}: is a whole bucket. Give a folder in it, as in {str(output).rstrip('/')}/pruned.")
    return output.with_name(f"{output.name}.partial")


def prepare_output(output: Path | UPath, overwrite: bool) -> None:
    """Make the output's parent folder, and raise InputError where the output can't be put.

    An existing folder is accepted only with `overwrite`, and then only if it is empty or holds a config.json:
    a folder that is not a checkpoint is never removed.
    """
    if is_remote(output):
        prepare_objects(output, overwrite)
        return
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
        raise InputError(f"{output} exists. Choose another output, or allow overwriting it with --overwrite.")
    if any(output.iterdir()) and not (output / CONFIG_FILE).is_file():
        raise InputError(
            f"{output} is not overwritten: it holds files but no config.json, so it is not a checkpoint. "
            "Choose another output, or remove the folder yourself."
        )


def publish(partial: Path | UPath, output: Path | UPath, overwrite: bool) -> None:
    """Make the finished folder `partial` visible as `output`, by one rename on one file system.

    An old output is first moved aside to `OUTPUT.replaced-*`, put back if the rename fails, and then removed. For an
    object store see `publish_objects`.
    """
    if is_remote(output):
        publish_objects(partial, output)
        return
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
    if is_remote(partial):
        try:
            with hold_lease(lock_of(partial)):
                yield
        except Held:
            raise _is_taken(partial) from None
        return
    lock_file = lock_of(partial)
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_file, timeout=GLANCE)
    try:
        lock.acquire()
    except Timeout as error:
        raise _is_taken(partial) from error
    try:
        yield
    finally:
        with suppress(OSError):
            lock_file.unlink()  # while still held, so that no other run's lock can be the one removed
        lock.release()


def is_locked(partial: Path) -> bool:
    """Whether a run is at work in `partial` now."""
    lock_file = lock_of(partial)
    if is_remote(partial):
        return is_held(lock_file)
    if not lock_file.exists():
        return False
    lock = FileLock(lock_file, timeout=0)
    try:
        with lock:
            return False
    except Timeout:
        return True


def lock_of(partial: Path | UPath) -> Path | UPath:
    """The file that says that a run is at work in `partial`."""
    return partial.with_name(f"{partial.name}.lock")


def _is_taken(partial: Path | UPath) -> InputError:
    return InputError(f"another run is writing to {partial}. Wait for it to end, or choose another output.")


def prepare_objects(output: UPath, overwrite: bool) -> None:
    """See that a checkpoint can be put into an object store; InputError where it can't.

    What is there already is accepted only with `overwrite`, and then only if it holds a config.json; or if it is what
    a run that is to be resumed has published of its result.
    """
    probe = partial_directory(output) / "probe"
    try:
        write_text(probe, "Can this be written?")
        probe.unlink()
        there = objects_in(output)
    except Exception as error:  # the clients of stores share no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{output} can't be written to ({reason}). Check the URL and your access to it.") from error
    if (partial_directory(output) / BEGUN).is_file():
        return
    is_checkpoint = (output / CONFIG_FILE).is_file()
    if is_checkpoint and not overwrite:
        raise InputError(f"{output} exists. Choose another output, or allow overwriting it with --overwrite.")
    if there and not is_checkpoint:
        raise InputError(
            f"{output} is not written to: it holds objects but no config.json, so it is not a checkpoint. "
            "Choose another output, or remove them yourself."
        )


def publish_objects(partial: UPath, output: UPath) -> None:
    """Make the finished folder `partial` visible as `output` in an object store, where nothing can be renamed.

    The store copies object after object, config.json last; without that, no tool takes the folder for a checkpoint. An
    old output's config.json goes first.
    """
    work = partial_directory(output)
    write_text(work / BEGUN, "")
    (output / CONFIG_FILE).unlink(missing_ok=True)
    remove_tree(output)
    files = files_in(partial)
    for name in sorted(files, key=CONFIG_FILE.__eq__):
        output.fs.copy(files[name].path, (output / name).path)
    write_text(work / PUBLISHED, "")


def published_mark(work: Path | UPath) -> UPath | None:
    """What says that the result of a run in that work folder was published; None where a rename says so."""
    return work / PUBLISHED if is_remote(work) else None


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
