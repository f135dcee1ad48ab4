"""The folder that a run works in, ``OUTPUT.partial``: journal, layers that are done, and the growing checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from upath import UPath

from distprune.checkpoint import ShardWriter, published_mark
from distprune.engine.run.journal import IDENTITY, Journal
from distprune.errors import StorageFailed
from distprune.storage import make_folder, remove_tree

# Journal entries: a step that needs no repeating, seconds by stage, that the result is about to be published, and what
# the run is about.
CHECK, SECONDS, PUBLISHING, OUTLINE = "check", "seconds", "publishing", "outline"


@dataclass(frozen=True)
class Outline:
    """What a run is about, for whoever asks how far it is."""

    model: str
    method: str
    sparsity: float
    layers: int
    distilled: bool
    has_gradients: bool = False


class WorkFolder:
    """What lies in the folder:

    - ``journal/``: what was done, and the hidden states that are still needed;
    - ``parts/``: the layers that are done, until they are assembled;
    - ``checkpoint/``: what becomes the output by one rename;
    - ``log.jsonl``: what happened when.
    """

    def __init__(self, folder: Path | UPath):
        self.folder = folder
        self.checkpoint = folder / "checkpoint"
        self.journal = Journal(folder / "journal")
        self.log = folder / "log.jsonl"

    def begin(self, identity: Mapping[str, Any], outline: Outline) -> bool:
        """Begin the run with that identity, or resume it. Returns whether it is resumed.

        Raises:
            InputError: another run has left something here.
        """
        if not self.journal.has(IDENTITY):
            self.remove()
        resumed = self.resumed = self.journal.begin(identity)
        make_folder(self.checkpoint)
        self.journal.write(OUTLINE, asdict(outline))
        self.writer = ShardWriter(self.folder)
        return resumed

    def remove(self) -> None:
        """Give up what is here."""
        for entry in (PUBLISHING, IDENTITY):  # first of all, or half a run could be published or gone on with
            self.journal.remove(entry)
        remove_tree(self.folder)

    def clear_away(self) -> None:
        """Remove what is left when the result is published, last of all what says so."""
        remove_tree(self.folder, last=published_mark(self.folder) or self.journal.file_of(PUBLISHING))

    def is_published(self) -> bool:
        """Whether the result was published, and what is here was to be cleared away."""
        if mark := published_mark(self.folder):
            return mark.is_file()
        return self.journal.has(PUBLISHING) and not self.checkpoint.exists()

    def is_cleared(self) -> bool:
        """Whether there is a folder with nothing left in it."""
        return self.folder.is_dir() and all(path.is_dir() for path in self.folder.rglob("*"))

    def is_worth_keeping(self) -> bool:
        """Whether more was done than to see that the input is sound."""
        return self.journal.has(CHECK)

    def once(self, step: str, do: Callable[[], None]) -> None:
        """Do a step, unless an earlier run has."""
        if not self.journal.has(step):
            with self.timed(step):
                do()
            self.journal.write(step)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds what happens inside to the seconds of a stage, those of earlier runs included.

        Where storage fails, that is told of, and not that the seconds could not be kept either.
        """
        start, before = time.perf_counter(), self.seconds()
        try:
            yield
        finally:
            spent = before.get(stage, 0.0) + time.perf_counter() - start
            with suppress(StorageFailed):
                self.journal.write(SECONDS, before | {stage: round(spent, 3)})

    def seconds(self) -> dict[str, float]:
        return self.journal.report(SECONDS) if self.journal.has(SECONDS) else {}
