"""What another project writes to get shuffled activation rows: open a store, stream it.

python examples/stream_rows.py acts.zarr
"""

import sys

import torch

import actcache

store = actcache.open(sys.argv[1])
print(store)

n_rows, total = 0, torch.zeros(store.width)
with store.stream(batch_size=1024, seed=0, outlier_norm_ratio=10, dtype=torch.float32) as stream:
    for (
        batch
    ) in stream:  # batch.rows [b, d], batch.layer [b]; batch.sequence, .position, .token, .document on demand
        n_rows += len(batch)
        total += batch.rows.sum(0)

print(f"{n_rows:,} rows of layers {list(stream.layers)}, norm of the mean row {(total / n_rows).norm():.2f}")
