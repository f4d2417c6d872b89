"""What a training run is: one frozen model, and the only place where its defaults live."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Layers = Annotated[tuple[int, ...], Field(strict=False)]  # a list will do; its items must be integers
Shares = Annotated[tuple[Positive, ...], Field(strict=False, min_length=2)]
Betas = Annotated[tuple[Decay, Decay], Field(strict=False)]

FormName = Literal["stacked", "feature", "crosscoder", "transcoder"]
Standardise = Literal["row", "layer"]
Activation = Literal["topk", "batchtopk", "relu"]
LossSpace = Literal["raw", "standardised"]
Precision = Literal["float32", "bfloat16"]

STANDARDISE: dict[FormName, Standardise] = {
    "stacked": "row",
    "feature": "row",
    "crosscoder": "layer",
    "transcoder": "row",
}
"""How the inputs of a form are standardised unless told otherwise."""

MULTI_TOPK = 4
"""Multi-TopK also reconstructs from this many times k latents. Source: Gao et al. (arXiv 2406.04093), section 4.2."""


class TrainConfig(BaseModel):
    """Everything that decides what a run computes, apart from its rows.

    A run's length is part of it: the learning rate decays towards the end, and the last batch is cut there.

    Attributes:
        form: what a row is and what is made of it, see `trainer.forms`.
        standardise: inputs by the `row`'s own mean and scale, or by fixed ones of its `layer`. None: `layer` for
            crosscoders (Lindsey et al. 2024, Sparse Crosscoders: one fixed scale per layer), else `row` (mlsae).
        layers: the model's layer numbers the rows come from, ascending; rows of other layers are passed over. None: all
            that the source has.
        expansion: latents per width of one layer. Source: tim-lawson/mlsae config.py.
        n_latents: number of latents f; overrides `expansion`.
        k: active latents per row; of `batchtopk` on average. Source: mlsae, and openai/sparse_autoencoder
            train.py:682-700.
        activation: `topk`: k latents of every row; `batchtopk`: k times the batch's rows, wherever they are largest
            (Bussmann et al., arXiv 2412.06410); `relu`: all positive ones, held down by `l1_coef` (the paper's baseline).
        multi_topk: add the loss of 4k latents, divided by 8. Source: Gao et al. (arXiv 2406.04093), section 4.2; the
            factors as in EleutherAI/sparsify sparse_coder.py and trainer.py.
        k_anneal_steps: k falls linearly to its value over these steps. Source: sparsify trainer.py:243-249.
        k_anneal_from: where it starts. None: 10 widths, at most f, as in sparsify trainer.py:191.
        matryoshka: shares of the latents, first ones first: every prefix of these groups must reconstruct by itself; the
            loss is the mean over prefixes. Source: Bussmann et al. (arXiv 2503.17547); weights as in
            saprmarks/dictionary_learning matryoshka_batch_top_k.py.
        l1_coef: of `relu`: weight of the mean over rows of sum |a|. None: 5/d. Source: Anthropic, Circuits Updates, April
            2024: lambda 5 on rows of mean squared norm d; our loss is per dimension.
        l1_warmup_frac: it rises linearly over this first fraction of the run. Source: as `l1_coef`.
        threshold_decay: of `batchtopk`: the inference threshold is the moving average, with this decay, of each batch's
            smallest selected value. Source: SAELens batchtopk_sae.py (its rate is 0.01).
        latent_bias: add a bias to every pre-activation, starting at 0. Source: openai model.py `latent_bias`; mlsae has
            none.
        skip: of a transcoder: add a linear map of the input, starting at 0. Source: Paulo et al. (arXiv 2501.18823).
        auxk: dead latents that explain the residual; 0 or None is off. Source: as `k`. With `relu` it is off: a dead
            latent is negative there and has no gradient.
        auxk_coef: weight of that loss. Source: Gao et al., appendix A.2.
        lr: Adam's learning rate. None: 2e-4 * sqrt(2^14 / f). Source: EleutherAI/sparsify trainer.py:109.
        batch_rows: most rows of one optimiser step over all processes; the source hands out batches of this size. Ours:
            8192 rows keep a CPU step near a second; on large devices use more (mlsae: 786,432).
        micro_rows: rows per forward and backward pass; None is the whole batch. It bounds memory and changes nothing else
            (sums are added in another order, so the last bits may differ).
        rows: stop after exactly this many rows. Excludes `epochs`.
        epochs: stop when the source, made for this many epochs, is exhausted. 1 unless `rows` is given.
        warmup_steps: the learning rate rises linearly over these steps. 0 as in mlsae: the tied start needs none.
        decay_frac: the learning rate falls linearly to 0 over this last fraction of the run. Needs the end to be known:
            `rows`, or a source with a length. One fifth as in SAELens' training tutorial.
        clip_norm: largest norm of the whole gradient after projection; None is off (openai train.py). 1.0 as in
            saprmarks/dictionary_learning trainers/top_k.py.
        ema_decay: the result is a moving average of the weights with this decay; None: the last weights. Gao et al. use
            0.999 (appendix A); openai train.py leaves it out.
        adam_betas: Source: PyTorch and mlsae.
        adam_eps: Source: openai train.py:682-700, mlsae lightning.py:61.
        dead_after_tokens: a latent is dead after this many tokens without a > 1e-3; where a row is one layer's, counted as
            rows / layers. Source: Gao.
        seed: of the initial weights.
        first_window_rows: vectors at the beginning on which the variance of each layer, baselines and the first bias are
            measured; whole batches that hold as many. A follower of a build on a small disk has no room for many. The
            default window of a store's stream, so nothing is read for it that is not needed anyway.
        loss_space: `raw` weighs a row's error by its size in the model; `standardised` weighs all rows alike.
        precision: of products: `bfloat16` multiplies in bfloat16; weights, gradients' sums and Adam stay in float32.
        compile: put element-wise parts of a step through torch.compile. Ours: off, since it takes a C++ compiler and some
            seconds to begin, and saves a few hundredths of a step on a CPU (docs/design/log.md).
        init_from: SHA-256 of the weights the run starts from; None: from `seed`. Set by `train`.
        checkpoint_every_steps: may differ between a run and its resumption, like the four below. Ours.
        keep_newest: checkpoints kept, the newest first. Ours.
        keep_every_steps: checkpoints whose step is a multiple of this are kept for ever; None: none are.
        eval_every_steps: steps between evaluations on held-out rows; None: none.
        eval_rows: most held-out rows of one evaluation; None: all.
        log_every_steps: steps per line of metrics.jsonl. Ours.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    form: FormName = "stacked"
    standardise: Standardise | None = None
    layers: Layers | None = None
    expansion: Count = 16
    n_latents: Count | None = None
    k: Count = 32
    activation: Activation = "topk"
    multi_topk: bool = False
    k_anneal_steps: CountOrZero = 0
    k_anneal_from: Count | None = None
    matryoshka: Shares | None = None
    l1_coef: Positive | None = None
    l1_warmup_frac: Fraction = 0.05
    threshold_decay: Decay = 0.99
    latent_bias: bool = False
    skip: bool = False
    auxk: CountOrZero | None = 256
    auxk_coef: Positive = 1 / 32
    lr: Positive | None = None
    batch_rows: Count = 8192
    micro_rows: Count | None = None
    rows: Count | None = None
    epochs: Count | None = None
    warmup_steps: CountOrZero = 0
    decay_frac: Fraction = 0.2
    clip_norm: Positive | None = 1.0
    ema_decay: Decay | None = None
    adam_betas: Betas = (0.9, 0.999)
    adam_eps: Positive = 6.25e-10
    dead_after_tokens: Count = 10_000_000
    seed: CountOrZero = 0
    first_window_rows: Count = 131_072
    loss_space: LossSpace = "raw"
    precision: Precision = "float32"
    compile: bool = False
    init_from: str | None = None
    checkpoint_every_steps: Count = 1000
    keep_newest: Count = 2
    keep_every_steps: Count | None = None
    eval_every_steps: Count | None = None
    eval_rows: Count | None = None
    log_every_steps: Count = 10

    @model_validator(mode="before")
    @classmethod
    def _one_epoch_unless_told(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("rows") is None and data.get("epochs") is None:
            return {**data, "epochs": 1}
        return data

    @model_validator(mode="after")
    def _check_together(self) -> TrainConfig:
        problems = [text for is_wrong, text in self._rules() if is_wrong]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _rules(self) -> list[tuple[bool, str]]:
        """What does not go together, and how it is said."""
        most = self.k * (MULTI_TOPK if self.multi_topk else 1)
        selects = self.activation != "relu"
        return [
            (
                self.rows is not None and self.epochs is not None,
                f"rows={self.rows} and epochs={self.epochs} both say when to stop; give one of them",
            ),
            (
                self.layers is not None and self.layers != tuple(sorted(set(self.layers))),
                f"layers={self.layers} must be ascending and distinct",
            ),
            (
                self.n_latents is not None and selects and most > self.n_latents,
                f"k={self.k}{' with multi_topk' * self.multi_topk} is {most} active latents of "
                f"n_latents={self.n_latents}; there can be at most n_latents",
            ),
            (
                self.multi_topk and self.activation != "topk",
                f"multi_topk needs activation='topk', not {self.activation!r}",
            ),
            (
                self.multi_topk and self.matryoshka is not None,
                "multi_topk and matryoshka are two ways to add losses; give one of them",
            ),
            (
                self.matryoshka is not None and abs(sum(self.matryoshka) - 1) > 1e-6,
                f"matryoshka={self.matryoshka} must sum to 1, they are shares of the latents",
            ),
            (
                not selects and bool(self.auxk) and "auxk" in self.model_fields_set,
                f"auxk={self.auxk} needs activation topk or batchtopk: a dead latent of relu has no gradient",
            ),
            (
                not selects and self.k_anneal_steps > 0,
                "k_anneal_steps needs activation topk or batchtopk: relu has no k",
            ),
            (
                selects and self.l1_coef is not None,
                f"l1_coef={self.l1_coef} needs activation='relu'; k decides the sparsity of {self.activation!r}",
            ),
            (self.skip and self.form != "transcoder", f"skip needs form='transcoder', not {self.form!r}"),
            (
                self.k_anneal_from is not None and self.k_anneal_from < self.k,
                f"k_anneal_from={self.k_anneal_from} is less than k={self.k}; k falls to its value",
            ),
        ]

    def resolve(self, width: int) -> TrainConfig:
        """The same run with everything that has a rule as a value, for rows of `width` per layer.

        Raises:
            ValueError: more active latents than there are.
        """
        n_latents = self.n_latents if self.n_latents is not None else self.expansion * width
        is_relu = self.activation == "relu"
        resolved: dict[str, Any] = {
            "n_latents": n_latents,
            "standardise": self.standardise or STANDARDISE[self.form],
            "lr": self.lr if self.lr is not None else 2e-4 * (2**14 / n_latents) ** 0.5,
            "auxk": 0 if is_relu else self.auxk or 0,
        }
        if is_relu and self.l1_coef is None:
            resolved["l1_coef"] = 5 / width
        if self.k_anneal_steps and self.k_anneal_from is None:
            resolved["k_anneal_from"] = max(self.k, min(n_latents, 10 * width))
        return TrainConfig.model_validate({**self.model_dump(), **resolved})
