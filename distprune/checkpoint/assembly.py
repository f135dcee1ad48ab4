"""Which parts go into which shard, written down so that a crash halfway through loses no part."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from distprune.checkpoint.durable import write_text
from distprune.checkpoint.layout import WEIGHTS_FILE, read_json


@dataclass(frozen=True)
class Assembly:
    """The shards of one checkpoint: file name -> the parts in it, in order."""

    destination: str  # relative to the plan's own folder, so that both can be moved together
    max_shard_bytes: int
    shards: dict[str, list[str]]

    @property
    def order(self) -> list[str]:
        """Every part, in the order of the shards."""
        return [part for parts in self.shards.values() for part in parts]

    def save(self, file: Path) -> None:
        """Write the plan durably as JSON."""
        write_text(file, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, file: Path) -> Assembly | None:
        """The plan that `save` wrote, or None where there is none."""
        return cls(**read_json(file)) if file.is_file() else None

    def built(self, file: Path) -> dict[str, list[str]]:
        """The shards that are already at the destination of the plan written at `file`."""
        destination = (file.parent / self.destination).resolve()
        return {shard: parts for shard, parts in self.shards.items() if (destination / shard).is_file()}


def plan_assembly(
    file: Path, destination: Path, order: Sequence[str], sizes: dict[str, int], max_shard_bytes: int
) -> Assembly:
    """Group consecutive parts into shards of at most `max_shard_bytes`; a larger part is a shard alone.

    `file` is where the plan will lie; `sizes` are the parts' sizes in bytes, 0 where a part has no tensors: it then
    makes no shard of its own.
    """
    groups: list[list[str]] = []
    room = 0
    for part in order:
        if not groups or sizes[part] > max(room, 0):
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(part)
        room -= sizes[part]
    names = _shard_names(len(groups))
    relative = os.path.relpath(str(destination), str(file.parent))
    return Assembly(relative, max_shard_bytes, dict(zip(names, groups, strict=True)))


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
