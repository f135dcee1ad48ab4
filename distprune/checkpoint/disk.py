"""Is there room for what is about to be written?"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from distprune.errors import InputError
from distprune.storage import is_remote

GB = 1_000_000_000


def check_free_space(path: Path, needed_bytes: int) -> None:
    """Raise InputError unless `needed_bytes` can be written at `path`, which need not exist yet.

    An object store has room for anything.
    """
    if is_remote(path):
        return
    free = free_bytes(path)
    if free < needed_bytes:
        raise InputError(
            f"{path} needs {needed_bytes / GB:.2f} GB, but the file system {_mount_point(_nearest_existing(path))} "
            f"has {free / GB:.2f} GB free. Free some space or choose a path on another file system."
        )


def free_bytes(path: Path) -> int:
    """What can be written at `path`, which need not exist yet."""
    return shutil.disk_usage(_nearest_existing(path)).free


def _nearest_existing(path: Path) -> Path:
    absolute = path.absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.exists())


def _mount_point(path: Path) -> Path:
    real = path.resolve()
    return next(folder for folder in (real, *real.parents) if os.path.ismount(folder))
