"""Loading models and tokenizers of transformers, with errors that say what was expected."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from actcache.errors import ModelError, NotFoundError, UsageError
from actcache.model.decoder import Decoder
from actcache.model.families import FAMILIES, find_family, text_config

_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def load_model(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    device_map: str | None = None,
) -> Decoder:
    """Load a causal language model from safetensors, for inference.

    Args:
        name: a local folder, or a model's id on the hub. A model that also sees images will do, if its text decoder is of
            a known family.
        revision: a commit, tag or branch on the hub.
        dtype: the compute dtype, as a torch dtype or its name ("float32"); "auto" is what the weights are stored in.
        device: where to put it.
        device_map: "auto" spreads the blocks over all GPUs, and over memory and disk where they do not suffice (other
            words of accelerate's will do too); `device` is then not used. Needs accelerate.

    Raises:
        NotFoundError: neither a folder here nor a model that can be had from the hub.
        ModelError: another family than `FAMILIES`, no safetensors, or weights that do not fill the model.
        UsageError: an unknown dtype, or accelerate is not installed.
    """
    torch_dtype = _parse_dtype(dtype)
    if device_map is not None:
        _check_accelerate(device_map)
    source = _find_source(name)
    config = _load_config(source, revision)
    find_family(config, source)
    try:
        loaded: Any = _auto_class(config, source).from_pretrained(
            source,
            config=config,
            revision=revision or "main",
            dtype=torch_dtype,
            device_map=device_map,
            attn_implementation=_attention(config),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{source}: the weights cannot be loaded: {_first_line(error)} Expected model.safetensors (or its shards and "
            "their index) beside config.json; convert other formats with save_pretrained(safe_serialization=True)"
        ) from error
    causal_lm, report = loaded
    mismatched = (key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])
    lacking = sorted([*report["missing_keys"], *mismatched])
    if lacking:
        raise ModelError(
            f"{source}: {len(lacking)} parameters are not in the weights or have another shape there, such as "
            f"{lacking[:3]}; they would be random. Use weights that belong to this config.json"
        )
    commit = getattr(config, "_commit_hash", None)
    if device_map is None:
        causal_lm = causal_lm.to(device)
    return Decoder(causal_lm, name=str(name), revision=commit or revision)


def load_skeleton(name: str | Path, *, revision: str | None = None) -> Decoder:
    """A model without its weights: shapes, hooks and widths can be asked of it, nothing can be captured.

    Reads config.json alone, so it takes no memory and, of a model on the hub, no download to speak of.

    Raises:
        NotFoundError, ModelError: as `load_model`.
    """
    source = _find_source(name)
    config = _load_config(source, revision)
    find_family(config, source)
    with torch.device("meta"):
        causal_lm = _auto_class(config, source).from_config(config)
    return Decoder(causal_lm, name=str(name), revision=getattr(config, "_commit_hash", None) or revision)


def _attention(config: PretrainedConfig) -> str | None:
    """Scores that are capped (Gemma 2) need eager attention: sdpa leaves the cap out, in some versions without a word."""
    return "eager" if getattr(text_config(config), "attn_logit_softcapping", None) is not None else None


def _auto_class(config: PretrainedConfig, source: str) -> Any:
    """Who makes a model of this configuration."""
    for mapping, auto in (
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    ):
        if type(config) in mapping:
            return auto
    raise ModelError(
        f"{source}: {config.model_type!r} is no language model for transformers; expected a causal language model, or a "
        f"model of images and text with one inside"
    )


def _check_accelerate(device_map: str) -> None:
    if device_map not in _DEVICE_MAPS:
        raise UsageError(f"device map {device_map!r}: expected one of {', '.join(_DEVICE_MAPS)}")
    if importlib.util.find_spec("accelerate") is None:
        raise UsageError(
            f"device map {device_map!r}: the package accelerate is not installed; run: pip install 'actcache[accelerate]'"
        )


def load_tokenizer(name: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local folder or of a model's id on the hub.

    Raises:
        NotFoundError: neither a folder here nor a model that can be had from the hub.
        ModelError: no tokenizer there that can be loaded.
    """
    source = _find_source(name)
    expected = "Expected tokenizer.json and tokenizer_config.json; name a folder or model that has them"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError, KeyError, ImportError) as error:
        kind = ModelError if Path(source).is_dir() else NotFoundError
        raise kind(f"{source}: no tokenizer can be loaded: {_first_line(error)} {expected}") from error
    if tokenizer.vocab_size <= len(
        tokenizer.all_special_ids
    ):  # what transformers makes up where it finds no files
        raise ModelError(f"{source}: no vocabulary there, special tokens only. {expected}")
    return tokenizer


def _parse_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)
    if found is None:
        raise UsageError(f"dtype {dtype!r}: expected auto, float32, bfloat16 or float16")
    return found


def _find_source(name: str | Path) -> str:
    """A folder's path, or a hub id; what can be neither is refused without asking the hub."""
    text = str(name)
    path = Path(name).expanduser()
    if text and path.is_dir():
        return str(path)
    if text and path.exists():
        raise ModelError(
            f"{text}: a file; expected a folder with config.json and model.safetensors, or a hub id"
        )
    if not text or isinstance(name, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise NotFoundError(
            f"{text or '(empty)'}: no such folder; expected a folder with config.json, or a hub id"
        )
    return text


def _load_config(source: str, revision: str | None) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(source, revision=revision or "main")
    except ValueError as error:
        raise ModelError(
            f"{source}: config.json names no model that transformers knows: {_first_line(error)} "
            f"Known families are {', '.join(sorted(FAMILIES))}"
        ) from error
    except OSError as error:
        if Path(source).is_dir():
            raise ModelError(
                f"{source}: no config.json that can be read: {_first_line(error)} Expected a folder as "
                "save_pretrained writes it"
            ) from error
        raise NotFoundError(
            f"{source}: not a folder here, and the hub does not give it: {_first_line(error)} Check the name and "
            "revision and that the hub can be reached, or give the path of a local folder"
        ) from error


def _first_line(error: BaseException) -> str:
    """The first line of an error's text, ended with a full stop."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    return line if line.endswith(".") else line + "."
