"""Each peer trained as its own documentation says, on whatever rows come. Peers are imported when first used."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from tests.interop.rows import BATCH, N_LATENTS, STEPS, WIDTH, K, Train


def make_saelens(rows: Iterator[Tensor], seed: int, checkpoints: Path | None = None, on_save=None):
    """SAELens: `SAETrainer` with our rows as its data provider; one checkpoint half way if it is told where."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)  # of the weights: SAELens takes no seed
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=WIDTH, d_sae=N_LATENTS, k=K, normalize_activations="expected_average_only_in"
        )
    )
    cfg = SAETrainerConfig(
        total_training_samples=STEPS * BATCH,
        train_batch_size_samples=BATCH,
        lr=3e-3,
        lr_end=3e-4,
        n_batches_for_norm_estimate=32,
        n_checkpoints=0 if checkpoints is None else 1,
        checkpoint_path=None if checkpoints is None else str(checkpoints),
    )
    return SAETrainer(cfg=cfg, sae=sae, data_provider=rows, save_checkpoint_fn=on_save)


def train_saelens(rows: Iterator[Tensor], seed: int) -> Callable[[Tensor], Tensor]:
    """SAELens, with its own estimate of the norm of activations."""
    return make_saelens(rows, seed).fit().eval()


def train_dictionary_learning(rows: Iterator[Tensor], seed: int) -> Callable[[Tensor], Tensor]:
    """dictionary_learning: `trainSAE`, normalising activations, which it does by writing to the rows it gets."""
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
    from dictionary_learning.training import trainSAE

    config = {
        "trainer": TopKTrainer,
        "steps": STEPS,
        "activation_dim": WIDTH,
        "dict_size": N_LATENTS,
        "k": K,
        "layer": 3,
        "lm_name": "arrays",
        "lr": 3e-3,
        "warmup_steps": 10,
        "seed": seed,
        "device": "cpu",
    }
    with TemporaryDirectory() as folder:
        trainSAE(
            data=rows,
            trainer_configs=[config],
            steps=STEPS,
            normalize_activations=True,
            device="cpu",
            save_dir=folder,
        )
        return AutoEncoderTopK.from_pretrained(f"{folder}/trainer_0/ae.pt")


def train_sparsify(rows: Iterator[Tensor], seed: int) -> Callable[[Tensor], Tensor]:
    """sparsify: a `SparseCoder` in the loop of its `Trainer`, which itself takes only tokens."""
    from sparsify import SparseCoder, SparseCoderConfig

    torch.manual_seed(seed)  # of the weights, as its trainer does
    coder = SparseCoder(WIDTH, SparseCoderConfig(num_latents=N_LATENTS, k=K), dtype=torch.float32)
    optimizer = torch.optim.Adam(coder.parameters(), lr=3e-3)
    for step, x in zip(range(STEPS), rows, strict=False):
        if step == 0:
            coder.b_dec.data = x.mean(0)
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
    return lambda x: coder(x).sae_out


PEERS: dict[str, Train] = {
    "saelens": train_saelens,
    "dictionary_learning": train_dictionary_learning,
    "sparsify": train_sparsify,
}
