"""What a run has done so far, on disk: whoever starts the same run again resumes there.

An entry is a report in JSON and, for some, tensors beside it. The report is written last, so an entry is there wholly
or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from distprune.checkpoint import read_names, read_tensor, read_tensors, write_tensors, write_text
from distprune.errors import InputError
from distprune.storage import make_folder

IDENTITY = "run"
#: Letters of a value that an error message shows; a digest has more.
READABLE = 32


def entry_of(kind: str, index: int) -> str:
    """The name of an entry about layer ``index``."""
    return f"{kind}-{index:05}"


class Journal:
    """The entries in one folder. Every method is durable: what it did survives a power cut."""

    def __init__(self, folder: Path):
        self.folder = folder

    def begin(self, identity: Mapping[str, Any]) -> bool:
        """Begin a run, or resume it.

        Args:
            identity: what the run makes and what of; only the same run may be resumed.

        Returns:
            Whether the run is resumed.

        Raises:
            InputError: another run was begun here.
        """
        if self.has(IDENTITY):
            begun = self.report(IDENTITY)
            differing = sorted(name for name in {*begun, *identity} if begun.get(name) != identity.get(name))
            if differing:
                named = ", ".join(difference(name, begun.get(name), identity.get(name)) for name in differing)
                raise InputError(
                    f"{self.folder.parent}: holds an unfinished run with another {named}. Give the same "
                    "options to go on with it, or --restart to begin anew."
                )
            return True
        make_folder(self.folder)
        self.write(IDENTITY, identity)
        return False

    def write(self, entry: str, report: Any = None, tensors: Mapping[str, Tensor] | None = None) -> None:
        if tensors:
            write_tensors(self._tensors_file(entry), {name: tensor.contiguous() for name, tensor in tensors.items()})
        write_text(self.file_of(entry), json.dumps(report) + "\n")

    def has(self, entry: str) -> bool:
        return self.file_of(entry).is_file()

    def report(self, entry: str) -> Any:
        return json.loads(self.file_of(entry).read_text(encoding="utf-8"))

    def tensors(self, entry: str) -> dict[str, Tensor]:
        file = self._tensors_file(entry)
        return read_tensors(file) if file.is_file() else {}

    def stored_tensors(self, entry: str) -> Mapping[str, Tensor]:
        """The same, each read when it is asked for."""
        file = self._tensors_file(entry)
        return StoredTensors(file) if file.is_file() else {}

    def remove(self, entry: str) -> None:
        """Remove an entry, if it is there."""
        self.file_of(entry).unlink(missing_ok=True)
        self._tensors_file(entry).unlink(missing_ok=True)

    def count(self, kind: str) -> int:
        """How many layers have an entry of a kind."""
        return len(list(self.folder.glob(f"{kind}-*.json")))

    def count_first(self, entries: Sequence[str]) -> int:
        """How many of these are there, up to the first that is not."""
        return next((number for number, entry in enumerate(entries) if not self.has(entry)), len(entries))

    def file_of(self, entry: str) -> Path:
        """Where an entry's report is."""
        return self.folder / f"{entry}.json"

    def _tensors_file(self, entry: str) -> Path:
        return self.folder / f"{entry}.safetensors"


def difference(name: str, begun: Any, now: Any) -> str:
    """What differs between two runs, with both values where they are words or numbers: not digests, nor nothing."""
    both = [str(value) for value in (begun, now) if isinstance(value, int | float | str)]
    is_readable = len(both) == 2 and all(len(value) <= READABLE for value in both)
    return f"{name} ({both[0]}, and now {both[1]})" if is_readable else name


class StoredTensors(Mapping[str, Tensor]):
    """The tensors in a safetensors file, which stay there."""

    def __init__(self, file: Path):
        self._file = file
        self._names = read_names(file)

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(self._file, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Hexadecimal SHA-256 of a run's identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
