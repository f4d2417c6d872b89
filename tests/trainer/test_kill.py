"""Killed with SIGKILL at random steps and resumed, a run is the same bit for bit: one process, and two."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.trainer.list_source import random_source
from tests.trainer.together import errors, finish, run_together, start, train_share
from trainer.config import TrainConfig
from trainer.loop import train_many
from trainer.ranks import Ranks

CONFIGS = {
    "": TrainConfig(
        n_latents=40,
        k=4,
        auxk=8,
        batch_rows=32,
        epochs=8,
        dead_after_tokens=40,
        lr=3e-3,
        ema_decay=0.99,
        activation="batchtopk",
        log_every_steps=3,
        checkpoint_every_steps=7,
        eval_every_steps=10,
    )
}
N_STEPS = 56
make_source = partial(random_source, epochs=8)
make_held_out = partial(random_source, 90, seed=5)


def die(report, step: int) -> None:
    if report.step == step:
        os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(ranks: Ranks, out: Path, deaths: dict[int, int]) -> None:
    """Train, and die after the step that `deaths` has for this rank."""
    share = {"rank": ranks.rank, "world_size": ranks.size}
    on_step = partial(die, step=deaths[ranks.rank]) if ranks.rank in deaths else None
    train_many(
        make_source(**share),
        CONFIGS,
        out,
        ranks=ranks,
        resume=True,
        held_out=make_held_out(**share),
        on_step=on_step,
    )


def files(out: Path) -> dict[str, bytes]:
    """What must be the same. metrics.jsonl has seconds in it; other tests compare its numbers."""
    names = ("sae.safetensors", "sae.json", "evaluation.jsonl", "checkpoints/best.json")
    return {name: (out / name).read_bytes() for name in names}


def kill_and_resume(folder: Path, size: int, rounds: int, seed: int) -> list[int]:
    """Runs that are killed at a random step and resumed; where there are two processes, one or both of them die.

    Returns:
        The steps.
    """
    generator = torch.Generator().manual_seed(seed)
    more = {"held_out": make_held_out}
    run_together(size, folder / "meet", train_share, make_source, CONFIGS, folder / "straight", more)
    expected = files(folder / "straight")
    steps = torch.randint(1, N_STEPS, (rounds,), generator=generator).tolist()
    for i, step in enumerate(steps):
        out, victims = folder / f"run-{i}", [i % size] if i % 3 else list(range(size))
        deaths = dict.fromkeys(victims, step)
        codes = finish(start(size, folder / f"first-{i}", train_and_die, out, deaths))
        assert all(codes[rank] == -signal.SIGKILL for rank in victims), (codes, errors(folder / f"first-{i}"))
        assert 0 not in codes
        run_together(size, folder / f"second-{i}", train_and_die, out, {})
        assert files(out) == expected, f"killed at step {step}"
    return steps


@pytest.mark.parametrize(("size", "rounds"), [(1, 3), (2, 2)])
def test_killed_and_resumed(tmp_path, size, rounds):
    assert len(kill_and_resume(tmp_path, size, rounds, seed=0)) == rounds
