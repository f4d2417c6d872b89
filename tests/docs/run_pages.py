"""Running the code blocks of a page, in order, in the current folder.

    ```bash            every line must succeed; `actcache ...` runs in this process, anything else in bash
    ```bash exit=1     its last command must end with that status
    ```bash no-run     needs what a test does not have: a hub, a GPU, minutes
    ```python          blocks of one page share their names
    ```text, ```json   shown, not run

Any other word is an error, so that no block is skipped by accident.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import Block, blocks

SHOWN = ("text", "json", "")


def commands(text: str) -> list[str]:
    """The commands of a block: one a line, continued by a backslash."""
    return [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def run_actcache(arguments: list[str]) -> int:
    """The command line in this process: importing torch for every command would take most of the time."""
    import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["actcache", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def run_command(command: str) -> int:
    words = shlex.split(command)
    if words[0] == "actcache":
        is_optional = words[-2:] == ["||", "true"]
        status = run_actcache(words[1:-2] if is_optional else words[1:])
        return 0 if is_optional else status
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["bash", "-euc", command], env={**os.environ, "PATH": path}, check=False).returncode


def expected_status(block: Block) -> int:
    for word in block.words:
        if word.startswith("exit="):
            return int(word.removeprefix("exit="))
    return 0


def run_bash(block: Block, page: Path) -> None:
    lines = commands(block.text)
    for command in lines:
        expected = expected_status(block) if command == lines[-1] else 0
        status = run_command(command)
        assert status == expected, f"{page.name}, line {block.line}: {command!r} ended with {status}"


def check_words(block: Block, page: Path) -> None:
    known = all(word == "no-run" or word.startswith("exit=") for word in block.words)
    assert block.language in ("bash", "python", *SHOWN), f"{page.name}, line {block.line}: {block.language}"
    assert known, f"{page.name}, line {block.line}: {block.words}"


def run_page(page: Path) -> int:
    """Run all blocks of a page; returns how many were run."""
    names: dict = {"__name__": "__page__"}
    n_run = 0
    for block in blocks(page):
        check_words(block, page)
        if block.language in SHOWN or "no-run" in block.words:
            continue
        n_run += 1
        if block.language == "python":
            source = "\n" * block.line + block.text
            exec(compile(source, str(page), "exec"), names)
        else:
            run_bash(block, page)
    return n_run
