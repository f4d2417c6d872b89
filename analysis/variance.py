"""How much of a latent's spread over layers is within a token, and how much only in aggregate: the law of total variance.

L is a layer, T a token, F a latent, drawn with probability P(l, t, f) proportional to w_f * a(l, t, f), a the activation:

    Var(L)          = E[Var(L|F)] + Var(E[L|F])
    E[Var(L|F)]     = E[Var(L|T,F)] + E[Var(E[L|T,F] | F)]

Two laws, because where one latent is always active they disagree wildly: `mass` has w_f = 1, so a latent counts by its
activation; `latent` has w_f = 1 / sum a(., ., f), so every latent counts alike.

Every term is accumulated by itself (weighted means and squared deviations per latent, merged as Chan et al. 1979 do), so the
identities are checks. All sums are float64 and sparse: nothing is [l, t, f].

Axes: l layers, t tokens, f latents.
"""

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from analysis.entries import Entries, segments, sum_by

Weighting = Literal["mass", "latent"]
F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class VarianceShares:
    """The decomposition under one weighting. Variances are of the model's layer numbers; NaN where nothing was active.

    weighting      "mass" or "latent".
    n_latents      latents active on `min_tokens` tokens or more: only they count.
    n_tokens       tokens looked at.
    n_pairs        (token, latent) pairs that count.
    min_tokens     see `n_latents`.
    var_l          Var(L).
    var_l_f        E[Var(L|F)].
    var_l_tf       E[Var(L|T,F)].
    between_t      E[Var(E[L|T,F] | F)].
    between_f      Var(E[L|F]).
    rel_f          var_l_f / var_l: how much of the spread is within latents.
    rel_t          var_l_tf / var_l_f: how much of that is within single tokens.
    identity       the larger error of the two identities, over var_l: what rounding leaves.
    """

    weighting: Weighting
    n_latents: int
    n_tokens: int
    n_pairs: int
    min_tokens: int
    var_l: float
    var_l_f: float
    var_l_tf: float
    between_t: float
    between_f: float
    rel_f: float
    rel_t: float
    identity: float


class LayerVariance:
    """Accumulates what both weightings need, per latent.

    n_tokens     tokens seen.
    n_active     [f] int64, tokens on which the latent is active on some layer.
    layer_mass   [l, f] sum over tokens of a.
    mass         [f] sum of a.
    mean         [f] mean layer, counted from the first one, weighted by a, from the tokens' own means.
    within       [f] sum over tokens and layers of a (l - m_tf)^2, m_tf the token's mean layer.
    between      [f] sum over tokens of a_tf (m_tf - mean)^2, a_tf the token's mass.
    pairs        [l + 1] int64, (token, latent) pairs by the number of layers they are active on; pairs[0] is 0.
    """

    def __init__(self, layers: tuple[int, ...], n_latents: int) -> None:
        self.layers = layers
        self._numbers = (
            np.array(layers, np.float64) - layers[0]
        )  # from where they are counted changes nothing but rounding
        self.n_tokens = 0
        self.n_active = np.zeros(n_latents, np.int64)
        self.layer_mass = np.zeros((len(layers), n_latents))
        self.mass, self.mean, self.within, self.between = (np.zeros(n_latents) for _ in range(4))
        self.pairs = np.zeros(len(layers) + 1, np.int64)

    def update(self, entries: Entries, n_tokens: int) -> None:
        """Add a block of tokens, each with its rows of ALL layers: a token whose rows are incomplete has no variance."""
        self.n_tokens += n_tokens
        if not len(entries):
            return
        n_latents = len(self.mass)
        a, latent = entries.activation, entries.latent
        shape = self.layer_mass.shape
        self.layer_mass += sum_by(entries.layer_i * n_latents + latent, a, self.layer_mass.size).reshape(
            shape
        )
        order = np.argsort(entries.token * n_latents + latent, kind="stable")
        keys = (entries.token * n_latents + latent)[order]
        starts = segments(keys)
        a, number = a[order], self._numbers[entries.layer_i[order]]
        mass_p = np.add.reduceat(a, starts)  # p: (token, latent) pairs
        mean_p = np.add.reduceat(a * number, starts) / mass_p
        sizes = np.diff(np.append(starts, len(a)))
        self.pairs += np.bincount(sizes, minlength=len(self.pairs))
        deviation = number - np.repeat(mean_p, sizes)
        within_p = np.add.reduceat(a * deviation**2, starts)
        latent_p = keys[starts] % n_latents
        mass = sum_by(latent_p, mass_p, n_latents)
        mean = sum_by(latent_p, mass_p * mean_p, n_latents) / np.where(mass > 0, mass, 1)
        between = sum_by(latent_p, mass_p * (mean_p - mean[latent_p]) ** 2, n_latents)
        self.n_active += np.bincount(latent_p, minlength=n_latents)
        self.within += sum_by(latent_p, within_p, n_latents)
        self._add_means(mass, mean, between)

    def _add_means(self, mass: F64, mean: F64, between: F64) -> None:
        total = self.mass + mass
        share = mass / np.where(total > 0, total, 1)
        delta = mean - self.mean
        self.between += between + delta**2 * self.mass * share
        self.mean += delta * share
        self.mass = total

    def merge(self, other: Self) -> None:
        """Add what another accumulator has seen."""
        self.n_tokens += other.n_tokens
        self.n_active += other.n_active
        self.layer_mass += other.layer_mass
        self.within += other.within
        self.pairs += other.pairs
        self._add_means(other.mass, other.mean, other.between)

    def compute(self, weighting: Weighting, min_tokens: int = 1) -> VarianceShares:
        """The decomposition over latents active on at least `min_tokens` tokens.

        A latent seen on one token has no variance between tokens, whatever its nature: a few such bias `rel_t` upwards.
        """
        chosen = (self.n_active >= max(min_tokens, 1)) & (self.mass > 0)
        mass = self.mass[chosen]
        weight = mass / mass.sum() if weighting == "mass" else np.full(len(mass), 1 / max(len(mass), 1))
        numbers = self._numbers
        p = self.layer_mass[:, chosen] / self.layer_mass[:, chosen].sum(0)
        mean_of_p = numbers @ p
        var_of_p = ((numbers[:, None] - mean_of_p) ** 2 * p).sum(0)
        p_all = p @ weight
        nan = float("nan")
        var_l = float(((numbers - numbers @ p_all) ** 2) @ p_all) if len(mass) else nan
        var_l_f = float(weight @ var_of_p) if len(mass) else nan
        var_l_tf = float(weight @ (self.within[chosen] / mass)) if len(mass) else nan
        between_t = float(weight @ (self.between[chosen] / mass)) if len(mass) else nan
        mean = self.mean[chosen]
        between_f = float(weight @ (mean - weight @ mean) ** 2) if len(mass) else nan
        return VarianceShares(
            weighting=weighting,
            n_latents=int(chosen.sum()),
            n_tokens=self.n_tokens,
            n_pairs=int(self.n_active[chosen].sum()),
            min_tokens=min_tokens,
            var_l=var_l,
            var_l_f=var_l_f,
            var_l_tf=var_l_tf,
            between_t=between_t,
            between_f=between_f,
            rel_f=_ratio(var_l_f, var_l),
            rel_t=_ratio(var_l_tf, var_l_f),
            identity=max(abs(var_l_f - var_l_tf - between_t), abs(var_l - var_l_f - between_f))
            / (var_l or 1.0),
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")
