"""Fenced blocks of the documents, with the line each one begins at."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
)
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]

_FENCE = re.compile(r"^(?P<fence>```+|~~~+)(?P<language>.*)$")


@dataclass(frozen=True)
class Block:
    """A block; its first line of source is line ``line`` of the document, from 1."""

    path: Path
    line: int
    language: str
    source: str

    @property
    def place(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """Return a document's blocks; indented fences are refused, so that none is overlooked."""
    blocks: list[Block] = []
    fence, language, first, lines = "", "", 0, []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if fence:
            if text.rstrip() == fence:
                blocks.append(Block(path, first, language, "\n".join(lines) + "\n"))
                fence = ""
            else:
                lines.append(text)
        elif found := _FENCE.match(text):
            fence, language = found["fence"], found["language"].strip()
            first, lines = number + 1, []
        else:
            assert not text.lstrip().startswith(("```", "~~~")), f"{path}:{number}: indented fence"
    assert not fence, f"{path}:{first - 1}: the block never ends"
    return blocks


def prose_of(path: Path) -> str:
    """Return a document without its blocks and comments."""
    inside, lines = "", []
    for text in path.read_text(encoding="utf-8").splitlines():
        found = _FENCE.match(text)
        if found and not inside:
            inside = found["fence"]
        elif inside:
            inside = "" if text.rstrip() == inside else inside
        else:
            lines.append(text)
    return re.sub(r"<!--.*?-->", "", "\n".join(lines), flags=re.DOTALL)
