"""Trainers to compare: each makes whole training steps on rows it is given, as its own project does them.

Everybody gets the same standardised rows, k, learning rate, Adam, and 1/32 of an auxiliary loss over half as many dead
latents as a row is wide, where they have one. `n_dead` latents can be forced to count as dead: the same ones for all.

Axes: b rows, d width, f latents, k active latents.
"""

import os
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actcache.flow import Batch
from trainer.config import TrainConfig
from trainer.kernels import make_kernels
from trainer.state import TrainState

AUX = 1 / 32


class Shape(NamedTuple):
    """What is trained. `device` is where; `kernels` are ours."""

    d: int
    f: int
    k: int
    b: int
    device: str = "cpu"
    kernels: str = "auto"
    precision: str = "float32"


class Trainer(Protocol):
    """Something that learns from rows."""

    def step(self, rows: Tensor, n_dead: int) -> None:
        """One optimiser step on rows [b, d], with the first `n_dead` latents counted as dead."""
        ...

    def reconstruct(self, rows: Tensor) -> Tensor: ...

    def active(self, rows: Tensor) -> Tensor:
        """[f] bool, latents active in some row."""
        ...


class _Source:
    """What our trainer asks a source of rows that are handed to it by hand."""

    def __init__(self, width: int) -> None:
        self.width, self.layers, self.fingerprint = width, (0,), "benchmark"


class Ours:
    """`TrainState.advance`, metrics and dead counters included."""

    def __init__(self, shape: Shape, first: Tensor, lr: float, seed: int) -> None:
        config = TrainConfig(
            n_latents=shape.f,
            k=shape.k,
            auxk=shape.d // 2,
            lr=lr,
            batch_rows=shape.b,
            rows=10**12,
            decay_frac=0.0,
            seed=seed,
            precision=shape.precision,  # type: ignore[arg-type]
        ).resolve(shape.d)
        device = torch.device(shape.device)
        self.source: Any = _Source(shape.d)
        self.state = TrainState.start(
            self.source,
            config,
            device,
            first=self._batch(first),
            kernels=make_kernels(shape.kernels, device),
        )

    def step(self, rows: Tensor, n_dead: int) -> None:
        if n_dead:
            self.state.dead.rows_since[:n_dead] = self.state.dead.after_rows
        self.state.advance(self._batch(rows))

    def reconstruct(self, rows: Tensor) -> Tensor:
        sae = self.state.trained(self.source, {})
        return sae.decode(sae.encode(rows))

    def active(self, rows: Tensor) -> Tensor:
        code = self.state.trained(self.source, {}).encode(rows)
        active = torch.zeros(self.state.model.n_latents, dtype=torch.bool, device=rows.device)
        active[code.indices[code.values > 0]] = True
        return active

    @staticmethod
    def _batch(rows: Tensor) -> Batch:
        return Batch(rows, torch.zeros(len(rows), dtype=torch.int64, device=rows.device))


class Dense:
    """Plain layers, plain autograd: what one writes first. Same losses, projection, clipping and norms as ours."""

    def __init__(self, shape: Shape, first: Tensor, lr: float, seed: int) -> None:
        torch.manual_seed(seed)  # noqa: TID251 (what decides the weights there)
        self.k, self.n_aux = shape.k, shape.d // 2
        self.encoder = nn.Linear(shape.d, shape.f, bias=False).to(shape.device)
        self.decoder = nn.Linear(shape.f, shape.d, bias=False).to(shape.device)
        self.decoder.weight.data = F.normalize(self.encoder.weight.data.T.clone(), dim=0)
        self.bias = nn.Parameter(first.mean(0))
        self.parameters = [self.encoder.weight, self.decoder.weight, self.bias]
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr)

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        pre = self.encoder(rows - self.bias)
        values, indices = pre.topk(self.k, dim=1)
        return pre, torch.zeros_like(pre).scatter(1, indices, values.relu())

    def step(self, rows: Tensor, n_dead: int) -> None:
        pre, acts = self.encode(rows)
        error = rows - self.decoder(acts) - self.bias
        loss = error.square().mean()
        if n_dead:
            values, indices = pre[:, :n_dead].topk(min(self.n_aux, n_dead), dim=1)
            dead = torch.zeros_like(pre).scatter(1, indices, values.relu())
            target = error.detach()
            ratio = (self.decoder(dead) - target).square().sum(1) / target.square().sum(1)
            loss = loss + AUX * ratio.mean()
        loss.backward()
        with torch.no_grad():
            weight = self.decoder.weight
            assert weight.grad is not None
            weight.grad -= (weight.grad * weight).sum(0) * weight
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            weight /= weight.norm(dim=0)
        self.optimizer.zero_grad()

    def reconstruct(self, rows: Tensor) -> Tensor:
        return self.decoder(self.encode(rows)[1]) + self.bias

    def active(self, rows: Tensor) -> Tensor:
        return (self.encode(rows)[1] > 0).any(0)


class SAELens:
    """`SAETrainer.step` on a `TopKTrainingSAE`."""

    def __init__(self, shape: Shape, first: Tensor, lr: float, seed: int) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(seed)  # noqa: TID251 (what decides the weights there)
        sae = TopKTrainingSAE(
            TopKTrainingSAEConfig(
                d_in=shape.d, d_sae=shape.f, k=shape.k, device=shape.device, aux_loss_coefficient=AUX
            )
        )
        with torch.no_grad():
            sae.b_dec.copy_(first.mean(0))
        config = SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=shape.b,
            lr=lr,
            lr_end=lr,
            device=shape.device,
        )
        self.trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))

    def step(self, rows: Tensor, n_dead: int) -> None:
        if n_dead:
            self.trainer.n_forward_passes_since_fired[:n_dead] = 10**6
        self.trainer.step(rows)

    def reconstruct(self, rows: Tensor) -> Tensor:
        return self.trainer.sae.eval()(rows)

    def active(self, rows: Tensor) -> Tensor:
        return (self.trainer.sae.eval().encode(rows) > 0).any(0)


class DictionaryLearning:
    """`TopKTrainer.update`."""

    def __init__(self, shape: Shape, first: Tensor, lr: float, seed: int) -> None:
        from dictionary_learning.trainers.top_k import TopKTrainer, geometric_median

        class Forced(TopKTrainer):
            """Counts latents as dead after it has forgotten those that were just active, as it does first."""

            n_dead = 0

            def get_auxiliary_loss(self, residual_BD: Tensor, post_relu_acts_BF: Tensor) -> Tensor:
                self.num_tokens_since_fired[: self.n_dead] = self.dead_feature_threshold
                return super().get_auxiliary_loss(residual_BD, post_relu_acts_BF)

        self.trainer = Forced(
            steps=10**9,
            activation_dim=shape.d,
            dict_size=shape.f,
            k=shape.k,
            layer=0,
            lm_name="benchmark",
            lr=lr,
            auxk_alpha=AUX,
            warmup_steps=1,
            seed=seed,
            device=shape.device,
        )
        self.trainer.ae.b_dec.data = geometric_median(first).to(shape.device)
        self.n_steps = 0

    def step(self, rows: Tensor, n_dead: int) -> None:
        self.n_steps += 1  # its step 0 would set the bias from this batch alone
        self.trainer.n_dead = n_dead
        self.trainer.update(self.n_steps, rows)

    def reconstruct(self, rows: Tensor) -> Tensor:
        return self.trainer.ae(rows)

    def active(self, rows: Tensor) -> Tensor:
        return (self.trainer.ae.encode(rows) > 0).any(0)


class Sparsify:
    """A `SparseCoder` in the loop of its `Trainer` with Adam, whose own input is tokens."""

    def __init__(self, shape: Shape, first: Tensor, lr: float, seed: int) -> None:
        if shape.device == "cpu":
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
        from sparsify import SparseCoder, SparseCoderConfig

        torch.manual_seed(seed)  # noqa: TID251 (what decides the weights there)
        self.coder = SparseCoder(
            shape.d, SparseCoderConfig(num_latents=shape.f, k=shape.k), shape.device, torch.float32
        )
        self.coder.b_dec.data = first.mean(0)
        self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=lr)

    def step(self, rows: Tensor, n_dead: int) -> None:
        self.coder.set_decoder_norm_to_unit_norm()
        mask = None
        if n_dead:
            mask = torch.zeros(self.coder.num_latents, dtype=torch.bool, device=rows.device)
            mask[:n_dead] = True
        out = self.coder(rows, dead_mask=mask)
        (out.fvu + AUX * out.auxk_loss).backward()
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def reconstruct(self, rows: Tensor) -> Tensor:
        self.coder.set_decoder_norm_to_unit_norm()
        return self.coder(rows).sae_out

    def active(self, rows: Tensor) -> Tensor:
        out = self.coder(rows)
        active = torch.zeros(self.coder.num_latents, dtype=torch.bool, device=rows.device)
        active[out.latent_indices[out.latent_acts > 0]] = True
        return active


TRAINERS: dict[str, Any] = {
    "actcache": Ours,
    "sparsify": Sparsify,
    "saelens": SAELens,
    "dictionary_learning": DictionaryLearning,
    "dense torch": Dense,
}
