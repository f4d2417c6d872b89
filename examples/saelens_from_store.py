"""Train a SAELens SAE on the rows of a store's last layer.

pip install sae-lens
python examples/saelens_from_store.py acts.zarr sae 20000
"""

import sys

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

import actcache

path, out, n_steps, b = sys.argv[1], sys.argv[2], int(sys.argv[3]), 2048
device = "cuda" if torch.cuda.is_available() else "cpu"
store = actcache.open(path)
layer = store.layers[-1]

sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=store.width, d_sae=16 * store.width, k=32, device=device))
sae.cfg.metadata.model_name = store.plan.request.model.name
sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
cfg = SAETrainerConfig(
    total_training_samples=n_steps * b, train_batch_size_samples=b, lr=3e-4, lr_end=3e-5, device=device
)
options = {"epochs": None, "drop_last": True, "dtype": torch.float32, "device": device}
with store.stream(batch_size=b, layers=[layer], **options) as stream:
    SAETrainer(cfg=cfg, sae=sae, data_provider=(batch.rows for batch in stream)).fit()
sae.save_inference_model(out)
