"""The fenced blocks of a page, in order, and which of them tests leave out.

A block that cannot be run says so on its page, with the reason: a comment in front of it
(`<!-- not run here: needs a TPU -->`), or a paragraph behind it that begins with "Not run here".
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.M | re.S)
_IN_FRONT = re.compile(r"<!-- not run here: (.+?) -->\s*\Z", flags=re.S)
_BEHIND = re.compile(r"\A\s*Not run here(.*?)(?=\n\n|\Z)", flags=re.S)
_ANY_MARK = re.compile(r"<!-- not run here|^Not run here", flags=re.M)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
      page: its page.
      line: of the page on which its text begins, from 1.
      language: "bash", "python", "json" or "".
      text: what stands between the fences.
      mark: why tests do not run it; None if they do.
    """

    page: Path
    line: int
    language: str
    text: str
    mark: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    source = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCED.finditer(source):
        mark = _IN_FRONT.search(source[: match.start()]) or _BEHIND.match(source[match.end() :])
        line = source.count("\n", 0, match.start()) + 2
        found.append(Block(page, line, match[1], match[2], mark and mark[1].strip(" :.")))
    return found


def marks(page: Path) -> int:
    """How many marks there are on a page, at a block or not."""
    return len(_ANY_MARK.findall(page.read_text(encoding="utf-8")))


def without(page: Path) -> str:
    """A page's text without its blocks."""
    return _FENCED.sub("", page.read_text(encoding="utf-8"))


def indented(page: Path) -> list[str]:
    """Lines of blocks that are indented instead of fenced."""
    return re.findall(r"^ {4}(?=\S)(.*)$", without(page), flags=re.M)
