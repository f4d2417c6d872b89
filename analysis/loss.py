"""What a model loses when an SAE's reconstruction stands in for its activations, and what it loses without them.

All conditions patch the same rows and are scored at the same positions. Sums are kept per sequence, since tokens of one
sequence are not independent: standard errors are those of a ratio of sums over sequences.

Axes: q sequences, t positions, n scored tokens, v vocabulary, m quantities.
"""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CONDITIONS = ("sae", "zero", "mean")
"""What stands in for a row: its reconstruction, nothing, its layer's mean over kept training rows."""

QUANTITIES = ("n", "clean", *(f"{c}_{what}" for c in CONDITIONS for what in ("loss", "kl", "logit_mse")))


class Estimate(NamedTuple):
    """A ratio of sums, and its standard error over sequences (NaN for one sequence)."""

    value: float
    se: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScores:
    """One layer, or all at once. Losses are cross-entropy of the next token, nats per token.

    n_tokens        scored: the row is patched and so is the next one.
    n_sequences     they come from.
    loss            of the model as it is.
    change          loss with reconstructions minus loss.
    zero_change     with zeros.
    mean_change     with the layer's mean.
    recovered_zero  (loss with zeros - loss with reconstructions) / (loss with zeros - loss).
    recovered_mean  the same with the mean for zeros.
    kl              KL(model || patched) = sum over v of p (log p - log p_patched), per token.
    zero_kl, mean_kl        likewise.
    logit_mse       mean over tokens and vocabulary of (logit patched - logit)^2.
    """

    n_tokens: int
    n_sequences: int
    loss: Estimate
    change: Estimate
    zero_change: Estimate
    mean_change: Estimate
    recovered_zero: Estimate
    recovered_mean: Estimate
    kl: Estimate
    zero_kl: Estimate
    mean_kl: Estimate
    logit_mse: Estimate

    def as_json(self) -> dict[str, Any]:
        """Plain values; an estimate is {"value", "se"}, null where it is not a number."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Estimate):
                value = {name: x if x == x else None for name, x in value._asdict().items()}
            found[field.name] = value
        return found


class LossSums:
    """Accumulates sums over sequences of every quantity and of every product of two: enough for any ratio and its error.

    first [m] = sum over q of s_q; second [m, m] = sum over q of s_q s_q^T, s_q the sums of one sequence. float64.
    """

    def __init__(self) -> None:
        m = len(QUANTITIES)
        self.n_sequences = 0
        self.first, self.second = np.zeros(m), np.zeros((m, m))

    def update(self, per_token: dict[str, Tensor], sequence: Tensor) -> None:
        """Add scored tokens.

        Args:
            per_token: [n] of each quantity but "n".
            sequence: [n] which sequence each is of. A sequence is added whole, in one call.
        """
        names, inverse = torch.unique(sequence.cpu(), return_inverse=True)
        columns = [
            per_token[name].double().cpu() if name != "n" else torch.ones(len(sequence), dtype=torch.float64)
            for name in QUANTITIES
        ]
        sums = torch.zeros(len(names), len(QUANTITIES), dtype=torch.float64)
        sums.index_add_(0, inverse, torch.stack(columns, 1))
        self.n_sequences += len(names)
        self.first += sums.sum(0).numpy()
        self.second += (sums.T @ sums).numpy()

    def merge(self, other: Self) -> None:
        """Add what another accumulator, of other sequences, has seen."""
        self.n_sequences += other.n_sequences
        self.first += other.first
        self.second += other.second

    def ratio(self, above: dict[str, float], below: dict[str, float]) -> Estimate:
        """sum(above) / sum(below), both linear in the quantities, with the error of a ratio estimator.

        se^2 = q / (q - 1) * sum over q of (above_q - r below_q)^2 / (sum of below)^2 (Cochran, Sampling Techniques, 6.4).
        """
        u, w = (_coefficients(part) for part in (above, below))
        denominator = float(w @ self.first)
        if denominator == 0:
            return Estimate(float("nan"), float("nan"))
        value = float(u @ self.first) / denominator
        c, q = u - value * w, self.n_sequences
        if q < 2:
            return Estimate(value, float("nan"))
        squares = max(float(c @ self.second @ c), 0.0) * q / (q - 1)
        return Estimate(value, squares**0.5 / abs(denominator))

    def compute(self) -> LossScores:
        """The scores of what was seen so far."""

        def per_token(**coefficients: float) -> Estimate:
            return self.ratio(coefficients, {"n": 1.0})

        def recovered(ablation: str) -> Estimate:
            worst = {f"{ablation}_loss": 1.0}
            return self.ratio({**worst, "sae_loss": -1.0}, {**worst, "clean": -1.0})

        return LossScores(
            n_tokens=int(self.first[QUANTITIES.index("n")]),
            n_sequences=self.n_sequences,
            loss=per_token(clean=1.0),
            change=per_token(sae_loss=1.0, clean=-1.0),
            zero_change=per_token(zero_loss=1.0, clean=-1.0),
            mean_change=per_token(mean_loss=1.0, clean=-1.0),
            recovered_zero=recovered("zero"),
            recovered_mean=recovered("mean"),
            kl=per_token(sae_kl=1.0),
            zero_kl=per_token(zero_kl=1.0),
            mean_kl=per_token(mean_kl=1.0),
            logit_mse=per_token(sae_logit_mse=1.0),
        )


def _coefficients(of: dict[str, float]) -> NDArray[np.float64]:
    return np.array([of.get(name, 0.0) for name in QUANTITIES])


class Scores(NamedTuple):
    """Per scored token [n] float64: cross-entropy of the next token, KL(model || patched), mean squared logit change."""

    loss: Tensor
    kl: Tensor
    logit_mse: Tensor


class Clean(NamedTuple):
    """What the unpatched model says at scored positions, [n, v] float32: logits, log-probabilities, probabilities."""

    logits: Tensor
    logp: Tensor
    p: Tensor


def clean_scores(logits: Tensor) -> Clean:
    """From the model's own logits [n, v]."""
    known = logits.float()
    logp = torch.log_softmax(known, 1)
    return Clean(known, logp, logp.exp())


def score(logits: Tensor, target: Tensor, clean: Clean) -> Scores:
    """Scores of logits [n, v] for targets [n] beside what the unpatched model says."""
    known = logits.float()
    logp = torch.log_softmax(known, 1)
    loss = -logp.gather(1, target[:, None])[:, 0]
    difference = clean.logits - known
    logit_mse = torch.linalg.vector_norm(difference, dim=1).square_() / known.shape[1]
    torch.sub(clean.logp, logp, out=difference)
    return Scores(loss.double(), torch.linalg.vecdot(clean.p, difference).double(), logit_mse.double())


def scored_positions(mask_qt: Tensor) -> Tensor:
    """[q, t] bool: positions whose row and whose next row are both in the mask; the last of a sequence never is."""
    scored = torch.zeros_like(mask_qt)
    scored[:, :-1] = mask_qt[:, :-1] & mask_qt[:, 1:]
    return scored
