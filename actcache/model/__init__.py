"""A decoder's blocks: load a causal language model, and capture the vectors at its hooks with nothing run after them."""

from actcache.model.decoder import Decoder
from actcache.model.families import FAMILIES, HOOKS, Family, Place
from actcache.model.isolation import check_isolation
from actcache.model.layers import parse_layers
from actcache.model.loading import load_model, load_skeleton, load_tokenizer
from actcache.model.positions import document_positions

__all__ = [
    "FAMILIES",
    "HOOKS",
    "Decoder",
    "Family",
    "Place",
    "check_isolation",
    "document_positions",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "parse_layers",
]
