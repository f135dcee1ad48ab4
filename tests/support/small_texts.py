"""Texts of the kinds that the documentation names."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = ("river", "runs", "down", "sea", "pruner", "mends", "what", "left", "rain", "hills", "model", "the", "and")
TEXTS = ("wikitext.txt", "wikitext_test.txt", "wikitext2_valid.txt", "wikitext2_test.txt", "wiki.txt", "test.txt")


def write_texts(folder: Path) -> None:
    """Long plain texts, and a file of instructions, under the names in :data:`TEXTS` and ``alpaca.jsonl``."""
    chance = random.Random(0)

    def sentence(words: int) -> str:
        return " ".join(chance.choices(WORDS, k=words)).capitalize() + "."

    for name in TEXTS:
        words = 400 if name.endswith("test.txt") else 60_000
        (folder / name).write_text("\n".join(sentence(12) for _ in range(words // 12)))
    records = [{"instruction": sentence(8), "input": "", "output": sentence(120)} for _ in range(600)]
    (folder / "alpaca.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
