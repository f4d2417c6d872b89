"""Train a sparsify SparseCoder on the rows of a store's last layer.

pip install eai-sparsify
export SPARSIFY_DISABLE_TRITON=1  # without a GPU
python examples/sparsify_from_store.py acts.zarr sae 20000
"""

import sys

import torch
from sparsify import SparseCoder, SparseCoderConfig

import actcache

path, out, n_steps, b = sys.argv[1], sys.argv[2], int(sys.argv[3]), 2048
device = "cuda" if torch.cuda.is_available() else "cpu"
store = actcache.open(path)
layer = store.layers[-1]

sae = SparseCoder(store.width, SparseCoderConfig(expansion_factor=16, k=32), device, torch.float32)
optimizer = torch.optim.Adam(sae.parameters(), lr=2e-4 / (sae.num_latents / 2**14) ** 0.5)
options = {"epochs": None, "drop_last": True, "dtype": torch.float32, "device": device}
with store.stream(batch_size=b, layers=[layer], **options) as stream:
    for step, batch in zip(range(n_steps), stream, strict=False):
        if step == 0:
            sae.b_dec.data = batch.rows.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        sae(batch.rows).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
sae.save_to_disk(f"{out}/layers.{layer}")
