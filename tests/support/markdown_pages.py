"""The documentation as data: pages, their blocks of code, their links and their headings."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\[]*\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of code, where it stands, and the language that it is said to be in."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Page:
    """A page in Markdown."""

    path: Path

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def prose(self) -> str:
        """The page without its blocks of code."""
        return FENCE.sub("", self.text)

    @cached_property
    def blocks(self) -> list[Block]:
        return [
            Block(self.path, self.text[: found.start()].count("\n") + 1, found[2], found[3])
            for found in FENCE.finditer(self.text)
        ]

    @property
    def links(self) -> list[str]:
        return [inline or reference for inline, reference in LINK.findall(self.prose)]

    @property
    def spans(self) -> list[str]:
        """What is set as code within the prose."""
        return SPAN.findall(self.prose)

    @cached_property
    def anchors(self) -> set[str]:
        """What links to the page's headings end in, as GitHub makes them."""
        seen: Counter[str] = Counter()
        anchors = set()
        for heading in HEADING.findall(self.prose):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
            anchor = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
            anchors.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
            seen[anchor] += 1
        return anchors


PAGES = [
    Page(path)
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        ROOT / "cluster" / "README.md",
        *sorted((ROOT / "distprune").rglob("*.md")),
    )
]


def blocks_in(language: str) -> list[Block]:
    return [block for page in PAGES for block in page.blocks if block.language == language]


@dataclass(frozen=True)
class Command:
    """A line of a block of shell commands, as the shell would split it, without comments.

    Attributes:
        block: where it stands.
        words: the program and its arguments.
        writes: the file that its output goes to, if any.
    """

    block: Block
    words: tuple[str, ...]
    writes: str | None = None

    def __str__(self) -> str:
        return f"{self.block}: {shlex.join(self.words)}"


def commands() -> Iterator[Command]:
    """Every command of every block in bash, each of those that ``&&`` joins."""
    for block in blocks_in("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                command, writes = words[:end], None
                if ">" in command:
                    *command, _, writes = command
                yield Command(block, tuple(command), writes)
                words = words[end + 1 :]
