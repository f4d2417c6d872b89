"""What stands around an example, against the store's tokens and the SAE itself."""

import functools

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from analysis.contexts import iter_contexts, write_examples
from analysis.examples import TopExamples
from analysis.latents import encode_store


@pytest.fixture(scope="module")
def found(subject, tmp_path_factory):
    latents = encode_store(subject, tmp_path_factory.mktemp("contexts") / "latents", split="train")
    top = TopExamples(2, subject.n_latents, 3)
    for codes in latents:
        top.update(codes.entries(), codes.sequence, codes.position, codes.token, codes.document)
    return latents, top.compute()


@pytest.fixture(scope="module")
def dense(subject):
    """Activations [t, f] by layer and sequence."""
    return functools.cache(lambda layer, q: dense_sequence(subject, layer, q))


def dense_sequence(subject, layer, q):
    code = subject.sae.encode(subject.store.read(layer=layer, sequences=q)[0].float())
    return torch.zeros(16, subject.n_latents).scatter_add_(1, code.indices, code.values).numpy()


@pytest.mark.parametrize("radius", [0, 2, 5, 40])
def test_contexts_end_at_their_sequences_and_hold_the_latents_activations(subject, found, dense, radius):
    latents, examples = found
    store, seen = subject.store, []
    for part in iter_contexts(examples, subject, latents, radius):
        assert part.tokens.shape == (len(part.example), 2 * radius + 1)
        for i, c in enumerate(part.example.tolist()):
            q, t = int(examples.sequence[c]), int(examples.position[c])
            layer = subject.layers[examples.layer_i[c]]
            for j, at in enumerate(range(t - radius, t + radius + 1)):
                token, activation = part.tokens[i, j], part.activations[i, j]
                if not 0 <= at < 16:
                    assert token == -1
                    assert np.isnan(activation)
                    continue
                assert token == store.tokens[q, at]
                if not store.keep[q, at]:
                    assert np.isnan(activation)
                    continue
                assert activation == pytest.approx(dense(layer, q)[at, examples.latent[c]], rel=1e-5)
            assert part.activations[i, radius] == pytest.approx(examples.activation[c], rel=1e-6)
            assert part.tokens[i, radius] == examples.token[c]
        seen += part.example.tolist()
    assert sorted(seen) == list(range(len(examples)))


def test_a_row_early_in_its_sequence_has_the_context_there_is(subject, found):
    """Not none at all: a negative start would give an empty slice."""
    latents, examples = found
    early = np.flatnonzero(examples.position <= 2)
    assert len(early)
    for part in iter_contexts(examples, subject, latents, 4):
        for i, c in enumerate(part.example.tolist()):
            if c in early:
                assert (part.tokens[i] >= 0).sum() == min(examples.position[c], 4) + 1 + 4


@pytest.mark.parametrize("with_text", [True, False])
def test_written_examples_can_be_queried(subject, found, tokenizer, tmp_path, with_text):
    latents, examples = found
    path, written = tmp_path / "examples.parquet", []
    pieces = (lambda token: tokenizer.decode([token])) if with_text else None
    write_examples(
        path,
        examples,
        iter_contexts(examples, subject, latents, 3),
        subject.layers,
        3,
        pieces,
        written.append,
    )
    assert sum(written) == len(examples)
    latent, layer_i = int(examples.latent[0]), int(examples.layer_i[0])
    rows = pq.read_table(
        path, filters=[("latent", "=", latent), ("layer", "=", subject.layers[layer_i])]
    ).to_pylist()
    mine = examples.of(latent, layer_i)
    rows.sort(key=lambda row: row["rank"])
    assert [row["rank"] for row in rows] == list(range(len(mine)))
    for row, q, t, a in zip(rows, mine.sequence, mine.position, mine.activation, strict=True):
        first, last = max(0, t - 3), min(16, t + 4)
        assert (row["sequence"], row["position"]) == (q, t)
        assert row["activation"] == pytest.approx(a)
        assert row["context_tokens"] == subject.store.tokens[q, first:last].tolist()
        assert row["context_at"] == t - first
        assert row["context_activations"][row["context_at"]] == pytest.approx(a)
        assert row["document"] == subject.store.document[q, t]
        if with_text:
            assert row["text"] == tokenizer.decode([row["token"]])
            assert row["context_before"] == "".join(
                tokenizer.decode([x]) for x in row["context_tokens"][: row["context_at"]]
            )
        else:
            assert row["text"] is None
    assert pq.read_table(path).num_rows == len(examples)


def test_activations_are_looked_up_by_row_and_latent(found):
    from analysis.contexts import look_up

    latents, _examples = found
    codes = next(iter(latents))
    token, layer, latent = (
        torch.randint(0, high, (500,)).numpy() for high in (len(codes), 2, latents.n_latents)
    )
    got = look_up(codes, token, layer, latent)
    dense = np.zeros((len(codes), 2, latents.n_latents), np.float32)
    for i in range(2):
        values, chosen = codes.padded(i)
        np.add.at(dense[:, i], (np.arange(len(codes))[:, None], chosen), values)
    assert np.array_equal(got, dense[token, layer, latent])
    assert (got > 0).any()
