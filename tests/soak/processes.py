"""Builds in processes of their own, which can be killed. One server imports everything and forks for each."""

import multiprocessing
from multiprocessing.context import ForkServerProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

from actcache.producer import workers
from actcache.producer.corpus import open_corpus
from actcache.producer.workers import Rank
from tests.conftest import Kit, no_sync, small_settings, train_tokenizer

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.soak.processes"])


def build(
    out: Path, corpus: Path, settings: dict, barrier: "Barrier | None" = None, rank: tuple[int, int] = (0, 1)
) -> None:
    kit = Kit(train_tokenizer(), open_corpus(corpus))
    workers.POLL_S, workers.PLAN_PATIENCE_S = 0.01, 0.3
    if barrier is not None:
        barrier.wait()
    with no_sync():  # a kill loses nothing that the kernel has
        kit.build(small_settings(out, **settings), rank=Rank(*rank))


def start_build(
    out: Path,
    kit: Kit,
    settings: dict,
    barrier: "Barrier | None" = None,
    rank: tuple[int, int] = (0, 1),
) -> ForkServerProcess:
    process = PROCESSES.Process(
        target=build, args=(out, kit.corpus.sources[0].opener.root, settings, barrier, rank)
    )
    process.start()
    return process
