"""What the parts of the GPU check find: rows of figures, written as they are found, and the table of all of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table


class Rows:
    """A part's rows, one JSON object a line, so that those found before a failure are kept."""

    def __init__(self, path: Path):
        self._path = path

    def add(self, what: str, found: str, ok: bool = True, **figures: object) -> None:
        """Tell one thing.

        Args:
            what: was measured or compared.
            found: the result, for people.
            ok: whether it is as it should be.
            figures: the same for programs.
        """
        row = {"what": what, "found": found, "ok": bool(ok), **figures}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{what}: {found}{'' if ok else '  <- WRONG'}", flush=True)

    @staticmethod
    def read(path: Path) -> list[dict]:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def part_arguments(description: str | None) -> argparse.Namespace:
    """What every part is told: its device, a folder for models and results, and the file of its rows."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="of the model that is pruned end to end, and served")
    return parser.parse_args()


def print_rows(console: Console, parts: Mapping[str, Mapping]) -> None:
    table = Table("part", "what", "found")
    for name, part in parts.items():
        for row in part["rows"]:
            table.add_row(name, row["what"], row["found"], style=None if row["ok"] else "bold red")
        if part["ended"] != "done":
            table.add_row(name, part["ended"], f"after {part['seconds']:.0f} s", style="bold red")
        table.add_section()
    console.print(table)
