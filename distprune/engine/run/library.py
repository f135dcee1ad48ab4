"""A library of the parts of a model's layers, each solved in several sizes, on disk.

``library.json`` says what there is; beside it, every part has a file with what of each size is not as in the dense
model. From it come checkpoints of any size without solving again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from upath import UPath

from distprune.budgets import Target
from distprune.checkpoint import read_names, read_tensor, write_tensors, write_text
from distprune.config import PLACEMENT
from distprune.engine.run.journal import fingerprint
from distprune.engine.run.record import CalibrationRecord
from distprune.engine.worker.library_tasks import Chosen, Differing
from distprune.errors import InputError
from distprune.search import PartOptions, shapes_of
from distprune.storage import make_folder

MANIFEST = "library.json"
#: The file with the fingerprint of the run that fills the library.
RUN = "run.txt"
#: The tensor beside those of a size that says which rotary pairs it has kept.
PAIRS = "rotary_pairs"
VERSION = 1
#: Options of what is done before parts are chosen, or after.
OF_SOLVING = ("calibration", "search", "from_library", "rounds", "distill")


class PartFiles:
    """The parts' files in one folder.

    Args:
        folder: where they are.
        parts: what each part may become.
    """

    def __init__(self, folder: Path | UPath, parts: Sequence[PartOptions]):
        self.folder, self.parts = folder, parts

    def file_of(self, number: int) -> Path | UPath:
        """Where a part's sizes are; the dense one is stored nowhere."""
        return self.folder / f"layer-{self.parts[number].layer:05}-{self.parts[number].part}.safetensors"

    def begin(self, run: str) -> None:
        """Begin to fill the folder, or resume it.

        Args:
            run: the fingerprint of the run that does.

        Raises:
            InputError: another one has.
        """
        file = self.folder / RUN
        if not file.is_file():
            make_folder(self.folder)
            write_text(file, run)
        elif file.read_text() != run:
            raise InputError(
                f"{self.folder}: holds the library of a run with other options. Choose another --library, or remove it."
            )

    def has(self, number: int) -> bool:
        """Whether a part's sizes are there."""
        return len(self.parts[number].shapes) == 1 or self.file_of(number).is_file()

    def write(self, number: int, sizes: Sequence[Differing]) -> None:
        """Write the sizes of a part from its second on, whole or not at all."""
        make_folder(self.folder)
        tensors = {}
        for choice, size in enumerate(sizes, 1):
            pairs = {} if size.rotary_pairs is None else {PAIRS: size.rotary_pairs}
            tensors |= {f"{choice}.{name}": tensor.contiguous() for name, tensor in {**size.tensors, **pairs}.items()}
        write_tensors(self.file_of(number), tensors)

    def read(self, number: int, choice: int) -> Differing:
        """One size of a part."""
        if choice == 0:
            return Differing()
        file, prefix = self.file_of(number), f"{choice}."
        names = [name for name in read_names(file) if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): read_tensor(file, name) for name in names}
        pairs = tensors.pop(PAIRS, None)
        return Differing(tensors, pairs)

    def chosen(self, target: Target, index: int, choices: Sequence[int]) -> Chosen:
        """A layer with these choices of its parts, given those of all layers."""
        differing = Differing()
        for number, part in enumerate(self.parts):
            if part.layer == index:
                differing = differing.with_other(self.read(number, choices[number]))
        return Chosen(shapes_of(target, self.parts, choices)[index], differing)


@dataclass(frozen=True)
class Library:
    """What a library's manifest says.

    Attributes:
        parts: what each part may become, and what that was predicted to cost.
        prices: what each part was measured to cost, as a multiple of that.
        model: what tells the model from every other.
        config: the run that made it.
        calibration: what it was calibrated on.
    """

    parts: list[PartOptions]
    prices: list[float]
    model: str
    config: dict[str, Any]
    calibration: CalibrationRecord

    def write(self, folder: Path | UPath) -> None:
        """Write the manifest, which is last of all: a folder without one is no library."""
        said = {
            "version": VERSION,
            "model": self.model,
            "config": self.config,
            "calibration": asdict(self.calibration),
            "parts": [part.to_json() for part in self.parts],
            "prices": self.prices,
        }
        write_text(folder / MANIFEST, json.dumps(said, indent=1) + "\n")

    @property
    def settings(self) -> dict[str, Any]:
        """The options of the run that made it, but those of what has no place where all parts are taken from it."""
        return {name: value for name, value in self.config.items() if name not in (*PLACEMENT, *OF_SOLVING)}

    @property
    def fingerprint(self) -> str:
        """A digest of what the library is of, and of all that plans read of it."""
        parts = [part.to_json() for part in self.parts]
        return fingerprint({"model": self.model, "config": self.config, "parts": parts, "prices": self.prices})

    @classmethod
    def read(cls, folder: Path | UPath) -> Library:
        """The library in a folder.

        Raises:
            InputError: there is none.
        """
        file = folder / MANIFEST
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            parts = [PartOptions.from_json(part) for part in said["parts"]]
            calibration = CalibrationRecord(**said["calibration"])
            return cls(parts, said["prices"], said["model"], said["config"], calibration)
        except OSError as error:
            raise InputError(
                f"{file}: can't be read ({error.strerror or error}). Give the folder that distprune prune --search "
                "--library FOLDER has made."
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: is no library's manifest ({error}). Make the library again.") from None
