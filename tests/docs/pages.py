"""Reading the documentation: tables, fenced code blocks, and the files that hold them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, the words after it, its text and the line it starts on."""

    language: str
    words: tuple[str, ...]
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        language, *words = match["info"].split() or [""]
        found.append(Block(language, tuple(words), match["body"], text[: match.start()].count("\n") + 1))
    return found


def sections(text: str, level: int) -> dict[str, str]:
    """Text below each heading of a level, by heading, up to the next heading of that or a higher level."""
    found, name = {}, None
    for line in text.splitlines():
        hashes = len(line) - len(line.lstrip("#")) if line.startswith("#") else 0
        if hashes and hashes <= level:
            name = line[hashes:].strip() if hashes == level else None
            if name is not None:
                found[name] = ""
        elif name is not None:
            found[name] += line + "\n"
    return found


def tables(text: str) -> list[list[dict[str, str]]]:
    """Every pipe table as rows, each a dictionary by column title."""
    found: list[list[dict[str, str]]] = []
    titles: list[str] | None = None
    for line in text.splitlines():
        if not line.startswith("|"):
            titles = None
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if titles is None:
            titles = cells
            found.append([])
        elif not set("".join(cells)) <= set("-:|"):
            assert len(cells) == len(titles), line
            found[-1].append(dict(zip(titles, cells, strict=True)))
    return found


def unquoted(cell: str) -> str:
    """A cell without its backticks."""
    return cell.strip("`")
