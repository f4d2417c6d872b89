"""Runs that are not one top-k SAE on the rows of all layers: one for each layer, batch top-k, transcoders, joint forms."""

import numpy as np
import pytest
import torch

import actcache
from actcache.errors import NotFoundError, UsageError
from actcache.patching import Patcher
from analysis.cross import cross_layers, cross_losses
from analysis.latents import encode_store
from analysis.output import analyse_and_write
from analysis.patched import evaluate_patched
from analysis.run import Request, analyse
from analysis.subject import find_runs, load_subject
from tests.analysis.conftest import run_cli, train
from tests.conftest import no_sync

SMALL = Request(
    n_examples=2, model_tokens=30, positions=("kept",), prompts=("the state of the union",), n_nearest=2
)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    with no_sync():
        train(tiny / "store.zarr", folder / "layers", "--hook", "resid_post", "--per-layer")
        train(
            tiny / "store.zarr", folder / "swept", "--hook", "resid_post", "--per-layer", "--sweep", "k=4,6"
        )
        train(tiny / "store.zarr", folder / "batch", "--hook", "resid_post", "--activation", "batchtopk")
        train(tiny / "store.zarr", folder / "relu", "--hook", "resid_post", "--activation", "relu")
        train(tiny / "store.zarr", folder / "fixed", "--hook", "resid_post", "--set", "standardise=layer")
        for skip in ("false", "true"):
            train(
                tiny / "store.zarr", folder / f"transcoder-{skip}", "--form", "transcoder", "--hook", "mlp_in", "--target-hook", "mlp_out",
                "--set", f"skip={skip}",
            )  # fmt: skip
        train(tiny / "store.zarr", folder / "crosscoder", "--form", "crosscoder", "--hook", "resid_post")
    return folder


@pytest.fixture
def load(tiny, runs):
    store = actcache.open(tiny / "store.zarr")
    return lambda name: load_subject(runs / name, store)


ALL = ["batch", "relu", "fixed", "layers", "transcoder-false", "transcoder-true"]


@pytest.mark.parametrize("name", ALL)
def test_rows_decoded_from_stored_latents_are_those_decoded_at_once(load, name, tmp_path):
    subject = load(name)
    latents = encode_store(subject, tmp_path / "latents")
    for codes, shard in zip(latents, subject.shards("holdout"), strict=True):
        for i, layer in enumerate(subject.layers):
            rows = shard.rows(layer, subject.hook, torch.float32)
            sae = subject.saes[layer]
            code = sae.encode(rows, torch.full((len(rows),), layer))
            values, chosen = (torch.from_numpy(c) for c in codes.padded(i))
            xhat, nothing = subject.reconstruct(rows, layer, values, chosen)
            torch.testing.assert_close(xhat, sae.decode(code))
            torch.testing.assert_close(
                nothing, sae.decode(code._replace(values=torch.zeros_like(code.values)))
            )
            first = subject.first_latent(layer)
            used = chosen[values > 0]
            assert ((used >= first) & (used < first + sae.sae.n_latents)).all()
    if name in ("batch", "relu"):
        sizes = [np.diff(codes.offsets) for codes in latents]
        assert len(np.unique(np.concatenate(sizes))) > 1, "as many latents on every row"


@pytest.mark.parametrize("name", ALL)
def test_everything_is_analysed(load, model, name, tmp_path):
    subject = load(name)
    found = analyse(subject, tmp_path, SMALL, model)
    assert set(found.evaluation.layers) == {0, 1}
    assert len(found.max_cosine) == subject.n_latents
    assert found.model.patched[0].together.n_tokens > 0
    if name == "layers":
        assert subject.n_latents == 2 * 64
        assert (found.evaluation.latents.n_layers <= 1).all()
        assert found.evaluation.latents.counts[0, 64:].sum() == 0
        assert found.variance["mass"].var_l_f == 0


@pytest.mark.parametrize("skip", ["false", "true"])
def test_a_transcoder_is_patched_at_mlp_out_from_what_went_in(load, decoder, skip):
    """Against whole forward passes in which the MLP's output is replaced by hand."""
    subject = load(f"transcoder-{skip}")
    (scores,) = evaluate_patched(subject, Patcher(decoder), n_tokens=10**9)
    store, sums = subject.store, {layer: [] for layer in subject.layers}
    (shard,) = subject.shards("holdout")
    mask = np.zeros((2, len(shard.sequences), 16), bool)
    mask[:, shard.sequence, shard.position] = shard.passes
    for q in shard.sequences:
        ids = torch.from_numpy(store.tokens[q].astype(np.int64))[None]
        with torch.inference_mode():
            clean = torch.log_softmax(decoder.causal_lm(ids, use_cache=False).logits[0].double(), 1)
        for i, layer in enumerate(subject.layers):
            at = torch.from_numpy(mask[i, q])

            def replace(_module, args, out, layer=layer, at=at):
                mine = subject.saes[layer]
                restored = mine.decode(mine.encode(args[0][0], torch.full((16,), layer)))
                return torch.where(at[None, :, None], restored[None], out)

            handle = decoder.blocks[layer].mlp.register_forward_hook(replace)
            with torch.inference_mode():
                patched = torch.log_softmax(decoder.causal_lm(ids, use_cache=False).logits[0].double(), 1)
            handle.remove()
            scored = np.flatnonzero(mask[i, q, :-1] & mask[i, q, 1:])
            target = ids[0, scored + 1]
            sums[layer] += (clean[scored, target] - patched[scored, target]).tolist()
    for layer, changes in sums.items():
        assert scores.layers[layer].n_tokens == len(changes)
        assert scores.layers[layer].change.value == pytest.approx(np.mean(changes), rel=1e-3, abs=1e-6)
        assert scores.layers[layer].change.value != 0


def test_the_diagonal_of_the_matrix_is_the_evaluation(load, decoder, tmp_path):
    subject = load("layers")
    matrix = cross_layers(subject, "holdout")
    found = analyse(subject, tmp_path, Request(n_examples=1))
    for layer in subject.layers:
        np.testing.assert_allclose(matrix[layer][layer].fvu, found.evaluation.layers[layer].fvu, rtol=1e-6)
        assert matrix[layer][layer].l0 == found.evaluation.layers[layer].l0
    assert matrix[0][1].fvu > matrix[1][1].fvu
    assert matrix[1][0].fvu > matrix[0][0].fvu
    losses = cross_losses(subject, Patcher(decoder), n_tokens=40, split="holdout")
    (alone,) = evaluate_patched(subject, Patcher(decoder), n_tokens=40)
    for layer in subject.layers:
        assert losses[layer][layer] == alone.layers[layer]
        assert list(losses[layer]) == [0, 1]
    assert losses[0][1].change != losses[1][1].change


def test_the_matrix_by_hand(load):
    """SAE of layer 0 on rows of layer 1: error over the variance of layer 1."""
    subject = load("layers")
    (shard,) = subject.shards("holdout")
    x = shard.rows(1, dtype=torch.float64)[torch.from_numpy(shard.passes[1])]
    xhat = subject.saes[0].decode(subject.saes[0].encode(x.float())).double()
    expected = ((x - xhat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert cross_layers(subject, "holdout")[0][1].fvu == pytest.approx(float(expected), rel=1e-5)


def test_one_sae_for_all_layers_has_no_matrix(subject):
    with pytest.raises(UsageError, match="--per-layer"):
        cross_layers(subject, "holdout")


def test_runs_are_found_by_their_folder_or_its_layers(runs):
    assert find_runs(runs / "batch") == [runs / "batch"]
    assert [path.name for path in find_runs(runs / "layers")] == ["layer=0", "layer=1"]
    assert [path.name for path in find_runs(runs / "swept" / "k=4")] == ["k=4,layer=0", "k=4,layer=1"]
    with pytest.raises(UsageError, match=r"name one of .*k=4, .*k=6"):
        find_runs(runs / "swept")
    with pytest.raises(NotFoundError, match="no finished run"):
        find_runs(runs / "nothing")


def test_latents_of_a_token_are_not_looked_for_at_layers(load):
    with pytest.raises(UsageError, match="crosscoder: its latents are of a token"):
        load("crosscoder")


def test_layers_that_the_store_lacks(load, tiny, runs, tmp_path, kit):
    from tests.conftest import small_settings

    with no_sync():
        kit.build(small_settings(tmp_path / "one.zarr", layers=(1,), dtype="float32"))
    with pytest.raises(UsageError, match=r"lacks \[0\] of them"):
        load_subject(runs / "batch", actcache.open(tmp_path / "one.zarr"))


def test_per_layer_runs_stand_beside_one_for_all(tiny, runs, model, tmp_path):
    store = actcache.open(tiny / "store.zarr")
    analyse_and_write(tiny / "run", store, tmp_path / "out", SMALL, model=model, compare=[runs / "layers"])
    text = (tmp_path / "out" / "compare" / "layers" / "report.html").read_text()
    assert "Layer by layer" in text
    assert (tmp_path / "out" / "compare" / "layers" / "tables" / "matrix.csv").exists()
    assert not (tmp_path / "out" / "tables" / "matrix.csv").exists()


def test_the_command_line_evaluates_all_of_them(tiny, runs, capsys):
    import json

    for name in (*ALL, "crosscoder"):
        more = ["--loss", "--model-tokens", 20, "--matrix"] if name == "layers" else []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("analysis.models.load_model", lambda *_a, **_k: whole_model())
            patch.setattr("analysis.models.load_tokenizer", lambda *_a, **_k: None)
            run_cli(
                "eval",
                runs / name,
                tiny / "store.zarr",
                "--json",
                "--device",
                "cpu",
                *more,
                *(["--model", "x"] if more else []),
            )
        found = json.loads(capsys.readouterr().out)
        assert set(found["layers"]) == {"0", "1"}
        assert found["mean"]["fvu"] > 0
        if more:
            assert found["matrix"]["0"]["1"]["fvu"] > found["matrix"]["1"]["1"]["fvu"]
            assert (
                found["matrix"]["0"]["0"]["loss"]["change"]["value"]
                == found["loss"][0]["layers"]["0"]["change"]["value"]
            )


def whole_model():
    from tests.conftest import make_decoder

    return make_decoder()
