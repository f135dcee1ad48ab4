"""The step that puts one result where its users look for it, unless it is there already."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distprune.checkpoint import INDISPENSABLE, check_destination, check_hub_ignore, read_published, upload_folder
from distprune.engine import load_record
from distprune.engine.run.record import NOT_FOR_THE_HUB, RECORD_FILE
from distprune.pipeline.step import Step, Surroundings


@dataclass(frozen=True)
class Publish(Step):
    """Puts the checkpoint in ``folder`` at ``destination``."""

    name: str
    folder: Path
    destination: str
    overwrite: bool
    private: bool
    hub_ignore: Sequence[str]
    inputs: Mapping[str, Any]

    def run(self, surroundings: Surroundings) -> dict[str, Any]:
        if not self.is_published():
            upload_folder(
                self.folder,
                self.destination,
                overwrite=self.overwrite,
                private=self.private,
                hub_ignore=[*NOT_FOR_THE_HUB, *self.hub_ignore],
            )
        return {"fingerprint": load_record(self.folder).fingerprint, "destination": self.destination}

    def is_there(self, result: Mapping[str, Any]) -> bool:
        return published_fingerprint(self.destination) == result["fingerprint"]

    def is_published(self) -> bool:
        """Whether what lies there is what lies in the folder."""
        return published_fingerprint(self.destination) == load_record(self.folder).fingerprint

    def check(self) -> None:
        """See that the result could be put there.

        Raises:
            InputError: it could not.
        """
        check_hub_ignore(self.hub_ignore, [*INDISPENSABLE, RECORD_FILE])
        check_destination(self.destination, overwrite=self.overwrite)


def published_fingerprint(destination: str) -> str | None:
    """The fingerprint of the run that made the checkpoint at a destination; None where there is no such."""
    record = read_published(destination, RECORD_FILE)
    try:
        return json.loads(record)["fingerprint"] if record else None
    except (ValueError, KeyError, TypeError):
        return None
