"""What a training run is: one frozen model, and the only place where its defaults live."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Layers = Annotated[tuple[int, ...], Field(strict=False)]  # a list will do; its items must be integers
Betas = Annotated[tuple[Decay, Decay], Field(strict=False)]


class TrainConfig(BaseModel):
    """Everything that decides what a run computes, apart from its rows.

    A run's length is part of it: the learning rate decays towards the end, and the last batch is cut there.

    Attributes:
        layers: the model's layer numbers the rows come from, ascending. None: all that the source has.
        expansion: latents per width. Source: tim-lawson/mlsae config.py.
        n_latents: number of latents f; overrides `expansion`.
        k: active latents per row. Source: mlsae, and openai/sparse_autoencoder train.py:682-700.
        auxk: dead latents that explain the residual; 0 or None is off. Source: as `k`.
        auxk_coef: weight of that loss. Source: Gao et al. (arXiv 2406.04093), appendix A.2.
        lr: Adam's learning rate. None: 2e-4 * sqrt(2^14 / f). Source: EleutherAI/sparsify trainer.py:109.
        batch_rows: most rows of one optimiser step; the source hands out batches of this size. Ours: 8192 rows keep a CPU
            step near a second; on large devices use more (mlsae: 786,432).
        micro_rows: rows per forward and backward pass; None is the whole batch. It bounds memory and changes nothing else
            (sums are added in another order, so the last bits may differ).
        rows: stop after exactly this many rows. Excludes `epochs`.
        epochs: stop when the source, made for this many epochs, is exhausted. 1 unless `rows` is given.
        warmup_steps: the learning rate rises linearly over these steps. 0 as in mlsae: the tied start needs none.
        decay_frac: the learning rate falls linearly to 0 over this last fraction of the run. Needs the end to be known:
            `rows`, or a source with a length. One fifth as in SAELens' training tutorial.
        clip_norm: largest norm of the whole gradient after projection; None is off (openai train.py). 1.0 as in
            saprmarks/dictionary_learning trainers/top_k.py.
        adam_betas: Source: PyTorch and mlsae.
        adam_eps: Source: openai train.py:682-700, mlsae lightning.py:61.
        dead_after_tokens: a latent is dead after this many tokens without a > 1e-3, counted as rows / layers. Source: Gao.
        seed: of the initial weights.
        loss_space: `raw` weighs a row's error by its size in the model; `standardised` weighs all rows alike.
        checkpoint_every_steps: may differ between a run and its resumption. Ours.
        log_every_steps: steps per line of metrics.jsonl. Ours.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    layers: Layers | None = None
    expansion: Count = 16
    n_latents: Count | None = None
    k: Count = 32
    auxk: Annotated[int, Field(ge=0)] | None = 256
    auxk_coef: Positive = 1 / 32
    lr: Positive | None = None
    batch_rows: Count = 8192
    micro_rows: Count | None = None
    rows: Count | None = None
    epochs: Count | None = None
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_frac: Fraction = 0.2
    clip_norm: Positive | None = 1.0
    adam_betas: Betas = (0.9, 0.999)
    adam_eps: Positive = 6.25e-10
    dead_after_tokens: Count = 10_000_000
    seed: Annotated[int, Field(ge=0)] = 0
    loss_space: Literal["raw", "standardised"] = "raw"
    checkpoint_every_steps: Count = 1000
    log_every_steps: Count = 10

    @model_validator(mode="before")
    @classmethod
    def _one_epoch_unless_told(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("rows") is None and data.get("epochs") is None:
            return {**data, "epochs": 1}
        return data

    @model_validator(mode="after")
    def _check_together(self) -> TrainConfig:
        if self.rows is not None and self.epochs is not None:
            raise ValueError(
                f"rows={self.rows} and epochs={self.epochs} both say when to stop; give one of them"
            )
        if self.layers is not None and self.layers != tuple(sorted(set(self.layers))):
            raise ValueError(f"layers={self.layers} must be ascending and distinct")
        if self.n_latents is not None and self.k > self.n_latents:
            raise ValueError(
                f"k={self.k} active latents of n_latents={self.n_latents}; k can be at most n_latents"
            )
        return self

    def resolve(self, width: int) -> TrainConfig:
        """The same run with `n_latents`, `lr` and `auxk` as numbers, for rows of `width`.

        Raises:
            ValueError: k is larger than the number of latents.
        """
        n_latents = self.n_latents if self.n_latents is not None else self.expansion * width
        lr = self.lr if self.lr is not None else 2e-4 * (2**14 / n_latents) ** 0.5
        resolved = {"n_latents": n_latents, "lr": lr, "auxk": self.auxk or 0}
        return TrainConfig.model_validate({**self.model_dump(), **resolved})
