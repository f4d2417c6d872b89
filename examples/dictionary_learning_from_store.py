"""Train a dictionary_learning SAE on the rows of a store's last layer.

pip install dictionary-learning
python examples/dictionary_learning_from_store.py acts.zarr sae 20000
"""

import sys

import torch
from dictionary_learning.trainers import TopKTrainer
from dictionary_learning.training import trainSAE

import actcache

path, out, n_steps, b = sys.argv[1], sys.argv[2], int(sys.argv[3]), 2048
device = "cuda" if torch.cuda.is_available() else "cpu"
store = actcache.open(path)
layer = store.layers[-1]

sae = {"trainer": TopKTrainer, "activation_dim": store.width, "dict_size": 16 * store.width, "k": 32}
about = {"layer": layer, "lm_name": store.plan.request.model.name, "device": device}
schedule = {"steps": n_steps, "warmup_steps": n_steps // 20}
options = {"epochs": None, "drop_last": True, "dtype": torch.float32, "device": device}
with store.stream(batch_size=b, layers=[layer], **options) as stream:
    rows = (batch.rows for batch in stream)
    trainSAE(rows, [sae | about | schedule], n_steps, save_dir=out, normalize_activations=True, device=device)
