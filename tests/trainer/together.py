"""Several processes of one run. One server imports everything and forks for each."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from actcache.errors import ActcacheError
from trainer.ranks import Ranks, join, leave

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    # the last is what a first collective imports
    ["tests.trainer.together", "tests.trainer.list_source", "trainer.loop", "torch.distributed.fsdp"]
)
FAILED = 3
LOST = 4
PATIENCE_S = 120


def _run(rank: int, size: int, meeting: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        ranks = join(torch.device("cpu"), f"file://{meeting}", rank, size)
        work(ranks, *args)
        leave()
    except ActcacheError as error:
        (meeting.parent / f"{meeting.name}-error-{rank}").write_text(f"{error.kind}: {error}")
        raise SystemExit(FAILED) from None
    except BaseException:
        (meeting.parent / f"{meeting.name}-error-{rank}").write_text(traceback.format_exc())
        raise


def start(size: int, meeting: Path, work: Callable[..., Any], *args: Any) -> list[ForkServerProcess]:
    """Processes that each call `work(ranks, *args)`; `meeting` is a file that is not there yet."""
    started = [
        PROCESSES.Process(target=_run, args=(rank, size, meeting, work, args), daemon=True)
        for rank in range(size)
    ]
    for process in started:
        process.start()
    return started


def finish(processes: list[ForkServerProcess]) -> list[int]:
    """Wait for all; their exit codes."""
    for process in processes:
        process.join(PATIENCE_S)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def run_together(size: int, meeting: Path, work: Callable[..., Any], *args: Any) -> None:
    """The same, to a good end."""
    codes = finish(start(size, meeting, work, *args))
    said = [path.read_text() for path in sorted(meeting.parent.glob(f"{meeting.name}-error-*"))]
    assert codes == [0] * size, "\n".join(said)


def errors(meeting: Path) -> dict[int, str]:
    """What each process said that failed."""
    return {
        int(path.name.rpartition("-")[2]): path.read_text()
        for path in meeting.parent.glob(f"{meeting.name}-error-*")
    }


def train_share(
    ranks: Ranks, make_source: Callable[..., Any], configs: dict[str, Any], out: Path, more: dict[str, Any]
) -> None:
    """Train on this rank's share of a source."""
    from trainer.loop import train_many

    source = make_source(rank=ranks.rank, world_size=ranks.size)
    held_out = more.pop("held_out", None)
    if held_out is not None:
        more["held_out"] = held_out(rank=ranks.rank, world_size=ranks.size)
    train_many(source, configs, out, ranks=ranks, **more)
