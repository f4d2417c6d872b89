"""Two processes that belong together: started side by side, ended side by side.

Each has its own log, and a pipe for standard input that nobody writes to: when the supervisor is gone, however it went,
the pipe ends, and a part that was told so (`TETHER`) ends itself as if it had been asked to.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TETHER = "ACTCACHE_TETHERED"
"""In the environment of a part: end when standard input does."""
_POLL_S = 0.2
_TAIL_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A process to be: what it is called, its command, where its output goes.

    is_goal  when it ends well, everything has: the others are asked to stop.
    """

    name: str
    command: Sequence[str]
    log: Path
    is_goal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How it all ended.

    outcome  finished; stopped: asked to; failed: `part` did, with `code`, and `tail` is the end of its log.
    """

    outcome: Literal["finished", "stopped", "failed"]
    part: str | None = None
    code: int = 0
    tail: str = ""


def supervise(
    parts: Sequence[Part],
    *,
    stop: Callable[[], bool],
    on_tick: Callable[[Mapping[str, int | None]], None] = lambda _codes: None,
    grace_s: float = 120.0,
) -> Ended:
    """Run all parts until the goal is reached, one fails, or `stop`; nobody is left running.

    Args:
        parts: started in this order.
        stop: asked several times a second.
        on_tick: told as often, with the exit code of each part, None while it runs.
        grace_s: who was asked to stop and has not for so long is killed.
    """
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for part in parts:
            running[part.name] = _start(part)
        while True:
            codes = {name: process.poll() for name, process in running.items()}
            on_tick(codes)
            failed = next((part for part in parts if codes[part.name]), None)
            if failed is not None:
                _end(running.values(), grace_s)
                return Ended(
                    outcome="failed", part=failed.name, code=codes[failed.name] or 1, tail=tail_of(failed.log)
                )
            if all(codes[part.name] == 0 for part in parts if part.is_goal):
                _end(running.values(), grace_s)
                return Ended(outcome="finished")
            if stop():
                _end(running.values(), grace_s)
                return Ended(outcome="stopped")
            time.sleep(_POLL_S)
    finally:
        for process in running.values():
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _start(part: Part) -> "subprocess.Popen[bytes]":
    part.log.parent.mkdir(parents=True, exist_ok=True)
    with part.log.open("ab") as log:
        return subprocess.Popen(
            list(part.command),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal goes to the supervisor alone, which asks each part once
            env={**os.environ, TETHER: "1"},
        )


def _end(processes: "Iterable[subprocess.Popen[bytes]]", grace_s: float) -> None:
    left = [process for process in processes if process.poll() is None]
    for process in left:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    for process in left:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tail_of(log: Path) -> str:
    """The end of a log, whole lines."""
    try:
        with log.open("rb") as found:
            found.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            data = found.read()
    except FileNotFoundError:
        return ""
    lines = data.decode("utf-8", "replace").splitlines()
    return "\n".join(lines[1 if len(data) == _TAIL_BYTES else 0 :][-20:])


def end_with_parent() -> None:
    """End this process, as SIGTERM would, when standard input ends. For parts that were told of their tether."""

    def wait() -> None:
        while sys.stdin.buffer.raw.read(1024):  # type: ignore[union-attr]
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="actcache-tether", daemon=True).start()
