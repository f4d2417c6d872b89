"""Memory that a build takes: its peak over that of the model alone, beside `--shard-memory`, for stores of any size.

    python benchmarks/build_memory.py --work /tmp/build_memory --out benchmarks/results/build_memory.json

A build may take that and 128 MiB for all the rest. Each number is the peak (VmHWM) of a process of its own, of a wide and shallow GPT-NeoX with random weights. "model" runs
the same batches of the same tokens and keeps nothing; "build" tokenises, plans, runs, encodes and commits. Linux only.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from actcache.model import Decoder
from actcache.producer.build import build
from actcache.producer.corpus import open_corpus
from actcache.producer.settings import Settings

WIDTH, N_LAYERS, SEQ_LEN, BATCH = 512, 3, 128, 16
HOOKS = ("resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post")
ROW_BYTES = WIDTH * N_LAYERS * len(HOOKS) * 2
CASES = [("zstd", 64 << 20, 4), ("zstd", 64 << 20, 16), ("zstd", 128 << 20, 16)]
CASES += [("none", 64 << 20, 16), ("uint8", 64 << 20, 16)]
"""Codec, shard memory, and how many times that a store is large."""
BESIDE = 128 << 20
"""What a build needs beside its two shards, whatever it stores: tokeniser, threads and what they work on."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**vocabulary, "<eos>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def make_decoder() -> Decoder:
    """Much to store for little to compute."""
    config = GPTNeoXConfig(
        vocab_size=257,
        hidden_size=WIDTH,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=SEQ_LEN,
    )
    return Decoder(GPTNeoXForCausalLM(config), name="wide")


def peak_bytes() -> int:
    """Of this process so far."""
    with Path("/proc/self/status").open() as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def run_model(n_tokens: int) -> None:
    """The model alone, over as many tokens."""
    layers = list(range(N_LAYERS))
    decoder, ids = make_decoder(), torch.arange(BATCH * SEQ_LEN).reshape(BATCH, SEQ_LEN) % 256
    decoder.cut(N_LAYERS - 1)
    for _ in range(0, n_tokens, BATCH * SEQ_LEN):
        decoder.capture_each(ids, dict.fromkeys(HOOKS, layers), lambda *_: None, None)


def run_build(work: Path, n_tokens: int, shard_memory: int, codec: str) -> None:
    """A whole build."""
    with (work / "text.jsonl").open("w") as lines:
        for i in range(n_tokens // 250 + 8):
            lines.write(json.dumps({"text": f"{i} " * (600 // (len(str(i)) + 1))}) + "\n")
    settings = Settings(
        out=work / "s.zarr",
        hooks=HOOKS,
        layers=tuple(range(N_LAYERS)),
        codec=codec,
        n_tokens=n_tokens,
        seq_len=SEQ_LEN,
        batch_size=BATCH,
        shard_memory_bytes=shard_memory,
    )
    corpus = open_corpus(work / "text.jsonl")
    build(settings, make_decoder(), make_tokenizer(), corpus, corpus_name="numbers", encode_threads=2)


def measure(work: Path, case: str, n_tokens: int, shard_memory: int, codec: str = "zstd") -> int:
    """Peak bytes of one case, in a process of its own."""
    work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--work", str(work), "--case", case, "--tokens", str(n_tokens)]
    command += ["--shard-memory", str(shard_memory), "--codec", codec]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    """Measure and print; write one JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help="model or build: only that one, in this process; prints its peak")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--shard-memory", type=int, default=96 << 20)
    parser.add_argument("--codec", default="zstd")
    arguments = parser.parse_args()
    tokens, bound = arguments.tokens, arguments.shard_memory
    if arguments.case:
        torch.set_num_threads(2)
        if arguments.case == "model":
            run_model(tokens)
        else:
            run_build(arguments.work, tokens, bound, arguments.codec)
        print(peak_bytes())
        return
    results = []
    model = measure(arguments.work / "model", "model", tokens, bound)
    for codec, bound, times in CASES:
        tokens, folder = times * bound // ROW_BYTES, arguments.work / f"{codec}.{bound}.{times}"
        built = measure(folder, "build", tokens, bound, codec)
        found = {"codec": codec, "shard_memory": bound, "store_bytes": tokens * ROW_BYTES, "model": model}
        results.append(found | {"build": built, "growth_of_bound": (built - model) / (bound + BESIDE)})
        print(results[-1], flush=True)
        shutil.rmtree(folder)
        if arguments.out:
            arguments.out.write_text(json.dumps({"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
