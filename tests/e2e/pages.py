"""The code blocks of the documentation, cut out of its pages and taken apart; nothing is run here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^( *)```([\w-]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)


def pages() -> dict[str, Path]:
    """Every page by its path from the repository's root."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path for path in found}


@dataclass(frozen=True)
class Block:
    """One fenced block: where it stands, what it is written in, and what is in it."""

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Step:
    """One simple command of a shell line.

    Attributes:
        words: the command and its arguments, unquoted; patterns of file names are not expanded.
        setting: assignments before it.
        into: file that its output goes to; empty for none.
        place: where it stands.
    """

    words: tuple[str, ...]
    setting: dict[str, str]
    into: str
    place: str

    @property
    def text(self) -> str:
        """The command with single spaces and no quotes, for tables that name commands."""
        return " ".join(self.words)


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page in order."""
    text = pages()[page].read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match[2], re.sub(f"(?m)^{match[1]}", "", match[3]))
        for match in _FENCE.finditer(text)
    ]


def steps(block: Block) -> Iterator[Step]:
    """The simple commands of a block of shell: comments, continued lines, `&&` and `>` as a shell has them."""
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                yield _step(words, block.place)
                words = []


def _step(words: list[str], place: str) -> Step:
    into = ""
    if len(words) > 2 and words[-2] == ">":
        words, into = words[:-2], words[-1]
    setting = {}
    while words and _ASSIGNMENT.fullmatch(words[0]):
        name, _, setting[name] = words.pop(0).partition("=")
    strange = [word for word in words if word and set(word) <= set("&|;<>")]
    assert not strange, f"{place}: {' '.join(strange)} is not understood in {' '.join(words)}"
    return Step(tuple(words), setting, into, place)
