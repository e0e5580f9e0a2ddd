"""The fenced blocks of the documents a user reads."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).parents[2]
DOCUMENTS = (REPO / "README.md", REPO / "deploy" / "README.md", *sorted((REPO / "docs").glob("*.md")))
# Drawings, and what a program prints: such blocks are not run.
SHOWN = "text"

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """`document` is relative to the project; `language` is what stands behind the fence."""

    document: str
    line: int
    language: str
    text: str

    @property
    def commands(self) -> tuple[str, ...]:
        """Its commands, without comments and with continued lines joined."""
        joined = self.text.replace("\\\n", " ")
        stripped = (re.sub(r"(^|\s)#.*", "", line) for line in joined.splitlines())
        return tuple(" ".join(line.split()) for line in stripped if line.strip())

    @property
    def name(self) -> str:
        """How the table of ways calls it: its document and its first command."""
        return f"{self.document}: {self.commands[0]}"


def read_blocks(document: Path) -> list[Block]:
    """All but those that only show something."""
    text = document.read_text()
    name = str(document.relative_to(REPO))
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(name, line, match[2], textwrap.dedent(match[3])))
    return [block for block in found if block.language != SHOWN]


def all_blocks() -> list[Block]:
    return [block for document in DOCUMENTS for block in read_blocks(document)]
