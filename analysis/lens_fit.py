"""Lenses made from a store: mean and scale, whitening, and a tuned lens trained against the model's own predictions.

Axes: b rows, d width, l layers, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actcache.errors import UsageError
from actcache.patching import Patcher
from analysis.moments import Moments
from analysis.reporter import Reporter
from trainer.lens import Lens

if TYPE_CHECKING:
    from actcache.reader.access import Split, Store
    from actcache.reader.shard_rows import ShardRows

Kind = Literal["scale", "whiten"]

_BLOCK_ROWS = 8192
_LOGIT_VALUES = 2**22
_HOOK = "resid_post"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowChoice:
    """Which rows a lens is made from: training rows of `resid_post`, as a run would choose them.

    layers              the model's layer numbers; None: all stored.
    outlier_norm_ratio  rows with a larger norm than this many times their layer's median are left out; None: none.
    n_tokens            kept tokens, to the end of a sequence; None: all.
    """

    layers: tuple[int, ...] | None = None
    outlier_norm_ratio: float | None = 10.0
    n_tokens: int | None = None

    def shards(self, store: Store, split: Split = "train") -> Iterator[ShardRows]:
        """Those rows, marked."""
        return store.iter_shards(
            split,
            hook=_HOOK,
            layers=self.layers,
            outlier_norm_ratio=self.outlier_norm_ratio,
            n_tokens=self.n_tokens,
        )

    def about(self, store: Store) -> dict[str, Any]:
        """For the lens's record."""
        request = store.plan.request
        return {
            "plan": store.plan.digest,
            "model": request.model.name,
            "model_digest": request.model.digest,
            "hook": _HOOK,
            "outlier_norm_ratio": self.outlier_norm_ratio,
            "n_tokens": self.n_tokens,
        }


class Covariance:
    """Accumulates mean [d] and summed outer products of deviations [d, d], float64, merged as Chan et al. (1979) do."""

    def __init__(self, width: int) -> None:
        self.n = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.m2 = torch.zeros(width, width, dtype=torch.float64)

    def update(self, x_bd: Tensor) -> None:
        """Add rows."""
        for x in x_bd.double().split(_BLOCK_ROWS):
            mean = x.mean(0)
            centred = x - mean
            self._add(len(x), mean, centred.T @ centred)

    def merge(self, other: Covariance) -> None:
        """Add what another accumulator has seen."""
        if other.n:
            self._add(other.n, other.mean, other.m2)

    def _add(self, n: int, mean: Tensor, m2: Tensor) -> None:
        delta, total = mean - self.mean, self.n + n
        self.m2 = self.m2 + m2 + torch.outer(delta, delta) * (self.n * n / total)
        self.mean = self.mean + delta * (n / total)
        self.n = total

    def compute(self) -> Tensor:
        """[d, d], divisor n."""
        return self.m2 / self.n


def fit_lens(
    store: Store,
    kind: Kind,
    choice: RowChoice,
    *,
    shrink: float = 1e-3,
    reporter: Reporter | None = None,
) -> Lens:
    """A lens that brings all layers to a common size.

    scale   y = (x - mean_l) / s_l, s_l the root of the mean variance of layer l: directions stay as they are.
    whiten  y = (C_l + shrink * mean variance * I)^(-1/2) (x - mean_l), C_l the covariance of layer l (ZCA): the symmetric
            root, so y is as near to x as white rows can be.

    Args:
        store: whose training rows.
        kind: "scale" or "whiten".
        choice: which of them.
        shrink: bounds the condition number of a whitening at sqrt(1 + largest variance / (shrink * mean variance)).
        reporter: hears of progress.

    Raises:
        UsageError: a layer has fewer rows than whitening it takes, or rows that are all alike.
    """
    said = reporter or Reporter()
    found: dict[int, Any] = {}
    said.on_stage("rows", sum(shard.passes.size for shard in choice.shards(store)), "rows")
    for shard in choice.shards(store):
        for i, layer in enumerate(shard.layers):
            x = shard.rows(layer, dtype=torch.float32)[torch.from_numpy(shard.passes[i])]
            width = x.shape[1]
            found.setdefault(layer, Covariance(width) if kind == "whiten" else Moments(width)).update(x)
            said.on_advance(len(shard))
    weights, means = [], []
    for layer, moments in found.items():
        covariance = moments.compute() if kind == "whiten" else None
        variance = float(
            (moments.m2.trace() if kind == "whiten" else moments.m2.sum()) / moments.n / len(moments.mean)
        )
        if moments.n < 2 or variance <= 0:
            raise UsageError(f"layer {layer}: {moments.n} rows of variance {variance}: nothing to scale by")
        if covariance is None:
            weights.append(torch.tensor(variance**-0.5, dtype=torch.float64))
        else:
            if moments.n <= len(moments.mean):
                raise UsageError(
                    f"layer {layer}: {moments.n} rows of width {len(moments.mean)}: whitening takes more rows than that"
                )
            values, vectors = torch.linalg.eigh(covariance)
            scale = (values.clamp_min(0) + shrink * variance).rsqrt()
            weights.append((vectors * scale) @ vectors.T)
        means.append(moments.mean)
    centre = torch.stack(means).float()
    about = {"kind": kind, **choice.about(store), **({"shrink": shrink} if kind == "whiten" else {})}
    return Lens(
        layers=tuple(found),
        centre=centre,
        weight=torch.stack(weights).float(),
        offset=torch.zeros_like(centre),
        about=about,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How a tuned lens is trained. Source of the objective and the start: Belrose et al. (arXiv 2303.08112).

    n_tokens  kept tokens trained on, in the order of the text (the plan's, which is random over sequences).
    batch_tokens  of one step.
    lr        Adam's, falling linearly to 0.
    """

    n_tokens: int = 250_000
    batch_tokens: int = 512
    lr: float = 1e-3


class TunedLens:
    """Translators in training: h + W_l h + c_l, W and c starting at 0, so the logit lens is where they start."""

    def __init__(
        self, layers: tuple[int, ...], n_layers: int, width: int, tuning: Tuning, device: torch.device
    ) -> None:
        self.layers, self._last, self._tuning = layers, n_layers - 1, tuning
        self.weight = torch.zeros(len(layers), width, width, device=device, requires_grad=True)
        self.offset = torch.zeros(len(layers), width, device=device, requires_grad=True)
        self._adam = torch.optim.Adam([self.weight, self.offset], lr=tuning.lr)
        self._n_seen = 0

    def step(self, patcher: Patcher, input_ids: Tensor, mask: Tensor) -> dict[int, float]:
        """One step on some sequences; returns the KL per layer before it.

        The loss of a layer is the mean over its rows of KL(model || read out of the translated row). The last block's output
        is what the model reads out itself: its map stays the identity.

        Args:
            patcher: of the model.
            input_ids: [q, t].
            mask: [l, q, t] rows to train on.
        """
        for group in self._adam.param_groups:
            group["lr"] = self._tuning.lr * max(0.0, 1 - self._n_seen / self._tuning.n_tokens)
        self._n_seen += int(mask.any(0).sum())
        losses = self._add_gradients(patcher, input_ids, mask)
        self._adam.step()
        self._adam.zero_grad()
        return losses

    def evaluate(self, patcher: Patcher, input_ids: Tensor, mask: Tensor) -> dict[int, tuple[float, int]]:
        """Summed KL and number of rows, per layer."""
        with torch.no_grad():
            return self._losses(patcher, input_ids, mask, lambda _loss: None)

    def _add_gradients(self, patcher: Patcher, input_ids: Tensor, mask: Tensor) -> dict[int, float]:
        n_rows = {layer: max(int(mask[i].sum()), 1) for i, layer in enumerate(self.layers)}
        found = self._losses(patcher, input_ids, mask, lambda loss: loss.backward(), n_rows)
        return {layer: total / max(n, 1) for layer, (total, n) in found.items()}

    def _losses(
        self,
        patcher: Patcher,
        input_ids: Tensor,
        mask: Tensor,
        on_loss: Callable[[Tensor], None],
        n_rows: dict[int, int] | None = None,
    ) -> dict[int, tuple[float, int]]:
        clean = patcher.run_clean(input_ids, _HOOK, self.layers)
        mask = mask.to(clean.hidden.device)
        size = max(1, _LOGIT_VALUES // patcher.decoder.vocab_size)
        found = {}
        for i, layer in enumerate(self.layers):
            rows, hidden = clean.acts[layer][mask[i]].float().clone(), clean.hidden[mask[i]]
            total = 0.0
            for start in range(0, len(rows), size):
                at = slice(start, start + size)
                logp = torch.log_softmax(patcher.logits(hidden[at]).float(), 1).clone()
                h = rows[at]
                seen = h if layer == self._last else h + h @ self.weight[i].T + self.offset[i]
                logq = torch.log_softmax(patcher.read_out(seen.to(clean.hidden.dtype)).float(), 1)
                loss = (logp.exp() * (logp - logq)).sum()
                total += float(loss.detach())
                if layer != self._last:
                    on_loss(loss / (n_rows[layer] if n_rows else 1))
            found[layer] = (total, len(rows))
        return found

    def lens(self, about: dict[str, Any]) -> Lens:
        """The lens as it is now: A = I + W."""
        width = self.offset.shape[1]
        weight = torch.eye(width) + self.weight.detach().cpu()
        offset = self.offset.detach().cpu().clone()
        return Lens(
            layers=self.layers, centre=torch.zeros_like(offset), weight=weight, offset=offset, about=about
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A tuned lens with what training it gave: KL(model || lens) per layer on held-out tokens, before (logit lens) and after."""

    lens: Lens
    before: dict[int, float]
    after: dict[int, float]
    n_tokens: int


def tune_lens(
    store: Store,
    patcher: Patcher,
    choice: RowChoice,
    tuning: Tuning,
    *,
    eval_tokens: int = 1000,
    reporter: Reporter | None = None,
) -> Tuned:
    """Train a tuned lens on the store's training tokens.

    Args:
        store: whose tokens, and whose captured layers.
        patcher: of its model.
        choice: which rows; its `n_tokens` is not used.
        tuning: how.
        eval_tokens: held-out kept tokens the lens is judged on.
        reporter: hears of progress.

    Raises:
        UsageError: the store has no `resid_post`.
    """
    if _HOOK not in store.hooks:
        raise UsageError(f"a tuned lens reads {_HOOK}, and {store.url} has {list(store.hooks)} only")
    layers = choice.layers or store.layers_of(_HOOK)
    said = reporter or Reporter()
    made = TunedLens(layers, patcher.decoder.n_layers, patcher.decoder.width, tuning, patcher.decoder.device)
    said.on_stage("judge the logit lens", eval_tokens, "tok")
    before, _n = _judge(made, store, patcher, choice, eval_tokens, said.on_advance)
    said.on_stage("train", tuning.n_tokens, "tok")
    for ids, mask in _batches(store, choice, "train", tuning.n_tokens, tuning.batch_tokens):
        made.step(patcher, ids, mask)
        said.on_advance(int(mask.any(0).sum()))
    said.on_stage("judge the lens", eval_tokens, "tok")
    after, n = _judge(made, store, patcher, choice, eval_tokens, said.on_advance)
    about = {"kind": "tuned", **choice.about(store), "n_tokens": tuning.n_tokens, "lr": tuning.lr}
    return Tuned(lens=made.lens(about), before=before, after=after, n_tokens=n)


def _judge(
    lens: TunedLens,
    store: Store,
    patcher: Patcher,
    choice: RowChoice,
    n_tokens: int,
    on_tokens: Callable[[int], None],
) -> tuple[dict[int, float], int]:
    totals: dict[int, tuple[float, int]] = dict.fromkeys(lens.layers, (0.0, 0))
    for ids, mask in _batches(store, choice, "holdout", n_tokens, 1024):
        for layer, (loss, n) in lens.evaluate(patcher, ids, mask).items():
            totals[layer] = (totals[layer][0] + loss, totals[layer][1] + n)
        on_tokens(int(mask.any(0).sum()))
    return {layer: loss / max(n, 1) for layer, (loss, n) in totals.items()}, max(
        n for _loss, n in totals.values()
    )


def _batches(
    store: Store, choice: RowChoice, split: Split, n_tokens: int, batch_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """input_ids [q, t] and the rows of each layer to look at [l, q, t]."""
    shards = store.iter_shards(
        split,
        hook=_HOOK,
        layers=choice.layers,
        outlier_norm_ratio=choice.outlier_norm_ratio,
        n_tokens=n_tokens,
    )
    for shard in shards:
        first = shard.sequences.start
        mask = torch.zeros(len(shard.layers), *shard.tokens.shape, dtype=torch.bool)
        mask[:, shard.sequence - first, shard.position] = torch.from_numpy(shard.passes)
        known = torch.unique(torch.from_numpy(shard.sequence - first))
        for chosen in known.split(max(1, batch_tokens // shard.tokens.shape[1])):
            yield torch.from_numpy(shard.tokens)[chosen], mask[:, chosen]
