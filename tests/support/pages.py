"""The pages of the documentation, and the blocks of code on them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"

PLACEHOLDER = "postgresql://scheduler:secret@db.example/cluster"
"""The URL of a PostgreSQL database in the examples."""

_FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"# (\w+\.py)\n")
_COMMAND = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    language: str
    text: str
    output: str | None = None
    """The expected output, where the page shows it directly below."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"

    @property
    def name(self) -> str | None:
        """The name of the file, where the first line is a comment such as `# worker.py`."""
        named = _NAME.match(self.text)
        return named[1] if named else None

    @property
    def needs_server(self) -> bool:
        """Whether the block connects to PostgreSQL."""
        return PLACEHOLDER in self.text

    def commands(self) -> Iterator[tuple[str, str]]:
        """The commands of a `console` block, each with its output."""
        yield from _COMMAND.findall(self.text)


def pages() -> list[Path]:
    """README, and every page below `docs`."""
    return [README, *sorted(DOCS.rglob("*.md"))]


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The blocks of a page in order, of one language or of all."""
    text = page.read_text(encoding="utf-8")
    fences = list(_FENCE.finditer(text))
    found = []
    for fence, following in zip_longest(fences, fences[1:]):
        output = None
        if following is not None and following[1] == "text":
            between = text[fence.end() : following.start()].strip()
            if between.endswith(("prints:", "输出：")) and "\n\n" not in between:
                output = following[2]
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(page, line, fence[1], fence[2], output))
    return [block for block in found if language in (None, block.language)]
