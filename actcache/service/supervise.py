"""Two processes that belong together: started side by side, ended side by side.

Each has its own log, and a pipe for standard input that nobody writes to: when the supervisor is gone, however it went,
the pipe ends, and a part that was told so (`TETHER`) ends itself as if it had been asked to.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actcache.errors import UsageError

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
    keep_open: Sequence[int] = (),
) -> Ended:
    """Run all parts until the goal is reached, one fails, or `stop`; nobody is left running.

    Args:
        parts: started in this order.
        stop: asked several times a second.
        on_tick: told as often, with the exit code of each part, None while it runs.
        grace_s: who was asked to stop and has not for so long is killed.
        keep_open: file descriptors that the parts get too: see `held`.
    """
    running: dict[str, subprocess.Popen[bytes]] = {}
    begins = {part.name: part.log.stat().st_size if part.log.exists() else 0 for part in parts}
    try:
        for part in parts:
            running[part.name] = _start(part, keep_open)
        while True:
            codes = {name: process.poll() for name, process in running.items()}
            on_tick(codes)
            failed = next((part for part in parts if codes[part.name]), None)
            if failed is not None:
                _end(running.values(), grace_s)
                return Ended(
                    outcome="failed",
                    part=failed.name,
                    code=codes[failed.name] or 1,
                    tail=tail_of(failed.log, begins[failed.name]),
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


@contextlib.contextmanager
def held(path: Path, patience_s: float = 30.0) -> Iterator[int]:
    """A lock that lasts until this process and every part that got its file descriptor have ended, however they do.

    Raises:
        UsageError: somebody else has it, and for so long.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + patience_s
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"another 'actcache run' is at work in {path.parent}; wait for it, or give another --out"
                    ) from error
            time.sleep(_POLL_S)
        yield lock
    finally:
        os.close(lock)


def _start(part: Part, keep_open: Sequence[int]) -> "subprocess.Popen[bytes]":
    part.log.parent.mkdir(parents=True, exist_ok=True)
    with part.log.open("ab") as log:
        return subprocess.Popen(
            list(part.command),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal goes to the supervisor alone, which asks each part once
            env={**os.environ, TETHER: "1"},
            pass_fds=tuple(keep_open),
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


def tail_of(log: Path, since: int = 0) -> str:
    """The end of a log, whole lines; nothing of what was in it before byte `since`."""
    try:
        with log.open("rb") as found:
            start = max(since, log.stat().st_size - _TAIL_BYTES)
            found.seek(start)
            data = found.read()
    except FileNotFoundError:
        return ""
    lines = data.decode("utf-8", "replace").splitlines()
    return "\n".join(lines[1 if start > since else 0 :][-20:])


def end_with_parent() -> None:
    """End this process, as SIGTERM would, when standard input ends. For parts that were told of their tether."""

    def wait() -> None:
        while sys.stdin.buffer.raw.read(1024):  # type: ignore[union-attr]
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="actcache-tether", daemon=True).start()
