"""Starting a run from another SAE's weights."""

from __future__ import annotations

from actcache.errors import PlanMismatchError
from trainer.config import TrainConfig
from trainer.sae import Dictionary
from trainer.trained import TrainedSAE

OPTIONAL = {"threshold", "latent_bias", "w_skip"}
"""Weights that start at zero where the other SAE has none."""


def take_weights(model: Dictionary, init: TrainedSAE, config: TrainConfig) -> None:
    """Start from the weights of `init`, decoder norms folded into activations."""
    weights, own = init.sae.state_dict(), model.state_dict()
    problems = [
        f"{name} is {list(weights[name].shape) if name in weights else 'missing'} there and {list(x.shape)} here"
        for name, x in own.items()
        if (name in weights and weights[name].shape != x.shape)
        or (name not in weights and name not in OPTIONAL)
    ]
    problems += [
        f"{name} is there and not here" for name in weights if name not in own and name != "threshold"
    ]
    if init.config.form != config.form:
        problems.append(f"form is {init.config.form!r} there and {config.form!r} here")
    if init.config.standardise != config.standardise:
        problems.append(f"standardise is {init.config.standardise!r} there and {config.standardise!r} here")
    if problems:
        raise PlanMismatchError(f"the SAE to start from does not fit this run: {'; '.join(problems)}")
    model.load_state_dict({**own, **{name: x for name, x in weights.items() if name in own}})
    model.fold_norms()
