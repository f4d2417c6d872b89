"""What changes on schedule: the learning rate, k, and the weight of the L1 penalty. Pure functions of how far a run is."""

from __future__ import annotations

from trainer.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, progress: float | None) -> float:
    """Lr * min(1, (step + 1) / warmup_steps) * min(1, (1 - progress) / decay_frac).

    Args:
        config: resolved.
        step: steps done before this one.
        progress: of the run, in [0, 1); None where its end is not known, which needs decay_frac=0.
    """
    factor = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.decay_frac > 0:
        assert progress is not None
        factor *= min(1.0, (1 - progress) / config.decay_frac)
    return (config.lr or 0.0) * factor


def active_latents(config: TrainConfig, step: int) -> int:
    """The k of the step after `step` steps: linearly from k_anneal_from down to k over k_anneal_steps.

    Source: EleutherAI/sparsify trainer.py:243-249.
    """
    if step >= config.k_anneal_steps:
        return config.k
    share = step / config.k_anneal_steps
    return round((config.k_anneal_from or config.k) * (1 - share) + config.k * share)


def l1_coef(config: TrainConfig, progress: float | None) -> float:
    """Weight of the L1 penalty: rises linearly to `l1_coef` over the first l1_warmup_frac of the run; 0 without one."""
    if config.l1_coef is None or not config.l1_warmup_frac:
        return config.l1_coef or 0.0
    assert progress is not None
    return config.l1_coef * min(1.0, progress / config.l1_warmup_frac)


def needs_end(config: TrainConfig) -> str | None:
    """The setting that needs to know where the run ends, or None."""
    if config.decay_frac > 0:
        return f"decay_frac={config.decay_frac} lets the learning rate fall towards the end of the run"
    if config.l1_coef is not None and config.l1_warmup_frac:
        return f"l1_warmup_frac={config.l1_warmup_frac} is a share of the run"
    return None


def ema_weight(decay: float, step: int) -> float:
    """How much of a moving average stays at step `step` (from 1): min(decay, (1 + step) / (10 + step)).

    So it does not hold on to what there was at the start. Source: TensorFlow ExponentialMovingAverage `num_updates`.
    """
    return min(decay, (1 + step) / (10 + step))
