"""Packed documents that do not see each other: every hook, every family, against each document run alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actcache.errors import ModelError, UsageError
from actcache.model import HOOKS, Decoder, check_isolation, document_positions
from tests.model.families import CONFIGS, N_LAYERS, VOCAB, WRAPPERS, CausalLM, make_decoder, randomise

LENGTHS = ([6, 1, 1, 7], [15], [1, 14])
T = 15


def packed(seed=3):
    """[q, t] ids and document numbers."""
    ids = torch.randint(0, VOCAB, (len(LENGTHS), T), generator=torch.Generator().manual_seed(seed))
    document = np.stack([np.repeat(np.arange(len(n)), n) for n in LENGTHS])
    return ids, document


def largest_difference(decoder, positions):
    """Over all hooks, layers and documents, between the packed run and each document alone: relative to the largest."""
    ids, document = packed()
    hooks = {hook: tuple(range(N_LAYERS)) for hook in HOOKS}
    together = decoder.capture(ids, hooks, positions)
    worst = 0.0
    for q in range(len(ids)):
        for d in range(document[q].max() + 1):
            at = np.flatnonzero(document[q] == d)
            alone = decoder.capture(ids[q, at][None], hooks)
            for key, expected in alone.items():
                scale = together[key].abs().max()
                worst = max(worst, ((together[key][q, at] - expected[0]).abs().max() / scale).item())
    return worst


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*CONFIGS, *WRAPPERS])
def test_isolated_documents_equal_each_document_run_alone(name, attention):
    if name == "gemma2" and attention == "sdpa":
        with pytest.raises(ValueError, match="does not support"):  # soft capping; transformers says so
            CausalLM.from_config(CONFIGS[name](), attn_implementation="sdpa")
        return
    decoder = make_decoder(name)
    decoder.causal_lm.set_attn_implementation(attention)
    positions = torch.from_numpy(document_positions(packed()[1]))
    assert largest_difference(decoder, positions) < 3e-5
    assert largest_difference(decoder, None) > 0.01  # without: documents do see each other
    check_isolation(decoder)


@given(
    document=st.lists(st.integers(0, 3), min_size=1, max_size=12).map(lambda d: np.array([d])),
)
def test_positions_count_from_the_beginning_of_each_document(document):
    expected, last = [], None
    for d in document[0].tolist():
        expected.append(expected[-1] + 1 if d == last else 0)
        last = d
    assert document_positions(document)[0].tolist() == expected


def _sees_all(right):
    t = right["position_ids"].shape[1]
    return {**right, "attention_mask": torch.ones(1, 1, t, t).tril().bool()}


def _counts_on(right):
    return {**right, "position_ids": torch.arange(right["position_ids"].shape[1])[None]}


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("llama", lambda right: {}),
        ("gpt2", _sees_all),
        ("opt", lambda right: {"position_ids": right["position_ids"]}),
        ("opt", _counts_on),
    ],
)
def test_the_check_notices_a_decoder_that_mixes_documents(name, spoil, monkeypatch):
    """Without the mask documents see each other; without the positions they are not as if alone."""
    decoder = make_decoder(name)
    right = decoder._isolating
    monkeypatch.setattr(decoder, "_isolating", lambda *given: spoil(right(*given)))
    with pytest.raises(ModelError, match=r"documents cannot be isolated.*leave out --isolate-documents"):
        check_isolation(decoder)


def test_bfloat16_is_isolated_as_well():
    for name in ("llama", "opt", "gemma2"):
        model = CausalLM.from_config(CONFIGS[name]())
        randomise(model)
        check_isolation(Decoder(model.to(torch.bfloat16)))


def test_positions_must_fit():
    with pytest.raises(UsageError, match=r"positions \(1, 3\): expected the shape of input_ids, \(1, 4\)"):
        make_decoder("gpt2").capture(
            torch.zeros(1, 4, dtype=torch.int64), {"resid_post": (0,)}, torch.zeros(1, 3, dtype=torch.int64)
        )


def test_attention_that_takes_no_mask_of_ours():
    decoder = make_decoder("opt")
    decoder.config._attn_implementation = "flex_attention"
    with pytest.raises(
        ModelError, match="'flex_attention': documents cannot be isolated; load it with sdpa or eager"
    ):
        check_isolation(decoder)
