"""Files that are either wholly there or not there at all, also after a crash or a power cut; objects always are."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distprune.checkpoint.headers import read_header
from distprune.checkpoint.objects import read_objects
from distprune.checkpoint.storage_failures import failures_explained, stalls_told, store_failures_explained
from distprune.storage import is_remote, upload


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    with failures_explained(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and `folder` itself."""
    with stalls_told(folder):
        for root, _, names in os.walk(folder):
            for name in names:
                sync(Path(root, name))
            sync(Path(root))


def move(source: Path, target: Path) -> None:
    """Give a flushed file another name, replacing `target`; copied only where the file systems differ.

    Of an object the store makes a copy, without its content passing through this machine.
    """
    if is_remote(target):
        with stalls_told(target), store_failures_explained(target):
            target.fs.copy(source.path, target.path)
            source.unlink()
        return
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with replacing(target) as temporary:
            shutil.copyfile(source, temporary)
        source.unlink()
    sync(target.parent)


@contextmanager
def replacing(target: Path, scratch: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path to write; it becomes `target` at the block's end, and is removed if that raises.

    The temporary file lies in `scratch`, by default beside the target.

    Raises:
        StorageFailed: there is no room for it, or the file system fails otherwise.
    """
    temporary = (scratch or target.parent) / f"{target.name}.tmp"
    with stalls_told(target), failures_explained(target):
        temporary.unlink(missing_ok=True)
        try:
            yield temporary
            sync(temporary)
            move(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(target: Path, text: str) -> None:
    """Write a UTF-8 file durably and atomically."""
    if is_remote(target):
        with stalls_told(target), store_failures_explained(target):
            target.write_text(text, encoding="utf-8")
        return
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(target: Path, tensors: Mapping[str, torch.Tensor], scratch: Path | None = None) -> None:
    """Write a safetensors file durably and atomically. Its bytes depend on the names and values alone.

    `tensors` are contiguous CPU tensors that share no memory. What becomes an object passes through a local file.
    """
    if is_remote(target):
        with TemporaryDirectory(prefix="distprune-upload-") as folder:
            file = Path(folder) / target.name
            with failures_explained(file):
                save_file(dict(tensors), file, metadata={"format": "pt"})
            with stalls_told(target), store_failures_explained(target):
                upload(file, target)
        return
    with replacing(target, scratch) as temporary:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
        temporary.chmod(mode)  # save_file ignores the umask and leaves 0600, which shuts out everyone else


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not is_remote(file):
        return load_file(file)
    return read_objects(read_header(file))


def read_names(file: Path) -> list[str]:
    """The names of a safetensors file's tensors, sorted."""
    return sorted(read_header(file))


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors file, of which no more than that is read.

    Raises:
        KeyError: the file holds none of that name.
    """
    if is_remote(file):
        return read_objects({name: read_header(file)[name]})[name]
    with safe_open(file, "pt") as tensors:
        if name not in tensors.keys():  # noqa: SIM118 - it is no mapping
            raise KeyError(name)
        return tensors.get_tensor(name)
