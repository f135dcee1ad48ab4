"""Parts of a checkpoint, written by whichever process has them to the folder where another assembles them.

What such a process writes lies under a name of its own until the assembling one accepts it. So one that was given up
long ago, or does what another does too, never changes what was accepted.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from upath import UPath

from distprune.checkpoint.durable import read_tensors, write_tensors, write_text
from distprune.storage import Location

SUFFIX = ".safetensors"
#: What a written file's name ends with until it is accepted.
OFFERED = ".offered"
TOKEN_FILE = "token"


@dataclass(frozen=True)
class WrittenFile:
    """A safetensors file that waits in the parts' folder to be accepted: its name there, and its size in bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class PartFolder:
    """The folder of parts, as told to processes that may be on machines that do not see it.

    ``token`` is what a file in it holds, since the same path may be another folder on another machine.
    """

    path: Location
    token: str

    @classmethod
    def announce(cls, path: Path | UPath) -> PartFolder:
        """Put a new token into the folder."""
        folder = cls(path, uuid.uuid4().hex)
        write_text(path / TOKEN_FILE, folder.token)
        return folder

    def is_seen(self) -> bool:
        """Whether this process sees the folder, and may write to it."""
        probe = self.path / f"{uuid.uuid4().hex}{OFFERED}"
        try:
            if (self.path / TOKEN_FILE).read_text(encoding="utf-8") != self.token:
                return False
            probe.write_text("", encoding="utf-8")
            probe.unlink()
        except Exception:  # file systems of all kinds raise all kinds, and another way to hand parts over is at hand
            return False
        return True

    def write(self, tensors: Mapping[str, torch.Tensor]) -> WrittenFile:
        """Write a file of these tensors durably, which lie on any device and may share memory.

        Raises:
            StorageFailed: there is no room for it, or the file system fails otherwise.
        """
        file = self.path / f"{uuid.uuid4().hex}{OFFERED}"
        write_tensors(file, separate_in_memory(tensors))
        return WrittenFile(file.name, file.stat().st_size)

    def merge(self, parts: Iterable[str]) -> WrittenFile:
        """Write a file of all tensors of accepted parts.

        Raises:
            FileNotFoundError: one of the parts is no longer there.
        """
        files = (self.path / (part + SUFFIX) for part in parts)
        return self.write({name: tensor for file in files for name, tensor in read_tensors(file).items()})


def separate_in_memory(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors of which no two share memory, as safetensors demands."""
    separate: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        stored = tensor.detach().cpu().contiguous()
        storage = stored.untyped_storage().data_ptr()
        separate[name] = stored.clone() if storage in storages else stored
        storages.add(storage)
    return separate
