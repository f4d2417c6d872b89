"""Lenses made from rows, trained against the model, and read from another package; runs trained through them."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import actcache
from actcache.errors import DamageError, NotFoundError, UsageError
from actcache.patching import Patcher
from analysis.evaluation import Wanted, evaluate_run
from analysis.lens_fit import Covariance, RowChoice, TunedLens, Tuning, fit_lens, tune_lens
from analysis.lens_import import import_tuned_lens
from analysis.output import analyse_and_write
from analysis.patched import evaluate_patched
from analysis.run import Request
from analysis.subject import load_subject
from tests.analysis.conftest import run_cli, train
from tests.analysis.made_up import cuts
from tests.conftest import no_sync
from tests.test_patching import VOCAB, WIDTH
from tests.test_patching import make_decoder as family_decoder
from trainer.lens import load_lens, save_lens

CHOICE = RowChoice(outlier_norm_ratio=1.3)


def chosen_rows(store, layer_i):
    parts = [s.rows(s.layers[layer_i], dtype=torch.float64)[torch.from_numpy(s.passes[layer_i])] for s in CHOICE.shards(store)]  # fmt: skip
    return torch.cat(parts)


@pytest.fixture(scope="module")
def store(tiny):
    return actcache.open(tiny / "store.zarr")


def test_scale_takes_off_the_mean_and_divides_by_one_number(store):
    lens = fit_lens(store, "scale", CHOICE)
    for i, layer in enumerate(lens.layers):
        x = chosen_rows(store, i)
        y = lens.apply(x, torch.tensor([layer])).double()
        assert float(y.mean(0).abs().max()) < 1e-5
        assert float(y.var(0, correction=0).mean()) == pytest.approx(1, rel=1e-5)
        a, b = x - x.mean(0), y
        torch.testing.assert_close(torch.cosine_similarity(a, b), torch.ones(len(x), dtype=torch.float64), rtol=1e-5, atol=1e-5)  # fmt: skip
    assert lens.about["kind"] == "scale"
    assert lens.about["outlier_norm_ratio"] == 1.3


def test_whitening_makes_white_rows(store):
    lens = fit_lens(store, "whiten", CHOICE, shrink=1e-9)
    for i, layer in enumerate(lens.layers):
        x = chosen_rows(store, i)
        y = lens.apply(x, torch.tensor([layer])).double()
        torch.testing.assert_close(torch.cov(y.T, correction=0), torch.eye(16, dtype=torch.float64), rtol=0.02, atol=0.02)  # fmt: skip
        assert torch.allclose(lens.weight[i], lens.weight[i].T, atol=1e-4), "the symmetric root"
        back = lens.invert(y.float(), torch.tensor([layer])).double()
        assert float((back - x).abs().max()) < 1e-4
    bounded = fit_lens(store, "whiten", CHOICE, shrink=0.1).conditions()
    for i, (layer, condition) in enumerate(bounded.items()):
        values = torch.linalg.eigvalsh(torch.cov(chosen_rows(store, i).T, correction=0))
        floor = 0.1 * float(values.mean())
        expected = ((values[-1] + floor) / (values[0] + floor)).sqrt()
        assert condition == pytest.approx(float(expected), rel=1e-3)
        assert condition < lens.conditions()[layer]


def test_whitening_takes_more_rows_than_dimensions(store):
    with pytest.raises(UsageError, match="whitening takes more rows"):
        fit_lens(store, "whiten", RowChoice(n_tokens=5, outlier_norm_ratio=None))


@given(st.data())
def test_merged_covariances_equal_one_pass(data):
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 50)))) + 30
    whole = Covariance(5)
    for cut in data.draw(cuts(40)):
        one = Covariance(5)
        if len(x[cut]):
            one.update(x[cut])
        whole.merge(one)
    assert whole.n == 40
    torch.testing.assert_close(whole.compute(), torch.cov(x.double().T, correction=0), rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def tuned(store, decoder):
    return tune_lens(
        store, Patcher(decoder), CHOICE, Tuning(n_tokens=200, batch_tokens=32, lr=3e-3), eval_tokens=60
    )


def test_a_tuned_lens_comes_nearer_to_the_models_predictions(tuned):
    assert tuned.after[0] < tuned.before[0]
    assert 1 < tuned.lens.conditions()[0] < 10
    assert tuned.n_tokens > 30


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_steps_lower_the_divergence(family, monkeypatch):
    """Of a model whose blocks do something: on the tokens it is trained on it more than halves in every layer but the last."""
    patcher = Patcher(family_decoder(family, monkeypatch))
    ids = torch.randint(0, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 4, 12, dtype=torch.bool)
    lens = TunedLens((0, 1, 2), 3, WIDTH, Tuning(n_tokens=10**6, lr=0.02), torch.device("cpu"))
    first = lens.step(patcher, ids, mask)
    for _ in range(60):
        last = lens.step(patcher, ids, mask)
    for layer in (0, 1):
        assert last[layer] < 0.5 * first[layer]
    assert last[2] == first[2] == pytest.approx(0, abs=1e-5)


def test_the_last_blocks_map_is_the_identity(tuned):
    assert torch.equal(tuned.lens.weight[1], torch.eye(16))
    assert torch.equal(tuned.lens.offset[1], torch.zeros(16))
    assert tuned.before[1] == pytest.approx(0, abs=1e-6)
    assert tuned.after[1] == tuned.before[1]


def test_what_is_minimised_is_the_divergence_from_the_model(store, decoder, tuned):
    """Against a plain computation: final norm and head of the translated row, KL(model || that)."""
    total, n = 0.0, 0
    for shard in store.iter_shards("holdout", outlier_norm_ratio=1.3, n_tokens=60):
        for q in np.unique(shard.sequence):
            ids = torch.from_numpy(store.tokens[q].astype(np.int64))[None]
            with torch.inference_mode():
                logp = torch.log_softmax(decoder.causal_lm(ids, use_cache=False).logits[0], 1)
                h = decoder.capture(ids, {"resid_post": (0,)})["resid_post", 0][0]
                seen = tuned.lens.apply(h, torch.tensor([0]))
                logits = (
                    decoder.causal_lm.lm_head
                    if hasattr(decoder.causal_lm, "lm_head")
                    else decoder.causal_lm.embed_out
                )
                logq = torch.log_softmax(logits(decoder.base.final_layer_norm(seen)), 1)
            at = shard.position[(shard.sequence == q) & shard.passes[0]]
            total += float((logp.exp() * (logp - logq)).sum(1)[at].sum())
            n += len(at)
    assert tuned.after[0] == pytest.approx(total / n, rel=1e-3)


# Of the package tuned-lens.


def write_tuned_lens(folder, n=2, width=16, suffix=".pt", **config):
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i in range(n):
        tensors[f"{i}.weight"] = 0.1 * torch.randn(width, width, generator=generator)
        tensors[f"{i}.bias"] = torch.randn(width, generator=generator)
    if suffix == ".pt":
        torch.save(tensors, folder / "params.pt")
    else:
        from safetensors.torch import save_file

        save_file(tensors, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps({"base_model_name_or_path": "m", "d_model": width, "num_hidden_layers": n, **config}))  # fmt: skip
    return tensors


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_translator_i_is_of_hidden_states_i_so_block_l_takes_the_next(tmp_path, decoder, suffix):
    """hidden_states[0] are the embeddings. The released MLSAE code gives the output of block i translator i."""
    tensors = write_tuned_lens(tmp_path / "lens", suffix=suffix)
    lens = import_tuned_lens(tmp_path / "lens", (0, 1), 2, 16)
    ids = torch.randint(0, 300, (1, 7), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        hidden = decoder.base(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        acts = decoder.capture(ids, {"resid_post": (0, 1)})
    h = hidden[1][0]
    assert torch.equal(acts["resid_post", 0][0], h)
    expected = (
        h + h @ tensors["1.weight"].T + tensors["1.bias"]
    )  # what tuned-lens computes for hidden_states[1]
    torch.testing.assert_close(lens.apply(h, torch.tensor([0])), expected)
    last = acts["resid_post", 1][0]
    torch.testing.assert_close(lens.apply(last, torch.tensor([1])), last)
    released = h + h @ tensors["0.weight"].T + tensors["0.bias"]
    assert float((released - expected).abs().max()) > 0.1


def test_some_layers_only(tmp_path):
    tensors = write_tuned_lens(tmp_path / "lens", n=5)
    lens = import_tuned_lens(tmp_path / "lens", (1, 4), 5, 16)
    assert lens.layers == (1, 4)
    torch.testing.assert_close(lens.weight[0], torch.eye(16) + tensors["2.weight"])
    assert torch.equal(lens.weight[1], torch.eye(16))


class Boom:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(NotFoundError, match=r"no config\.json"):
        import_tuned_lens(tmp_path, (0,), 2, 16)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NotFoundError, match=r"no params\.pt"):
        import_tuned_lens(tmp_path, (0,), 2, 16)
    (tmp_path / "params.pt").write_bytes(b"not a file of torch")
    with pytest.raises(DamageError, match="cannot be read"):
        import_tuned_lens(tmp_path, (0,), 2, 16)
    torch.save({"0.weight": Boom()}, tmp_path / "params.pt")
    with pytest.raises(DamageError, match="cannot be read"):
        import_tuned_lens(tmp_path, (0,), 2, 16)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DamageError, match=r"config\.json cannot be read"):
        import_tuned_lens(tmp_path, (0,), 2, 16)
    write_tuned_lens(tmp_path / "lens", n=3)
    with pytest.raises(UsageError, match=r"has 3 translators .* this model has 2 blocks of width 16"):
        import_tuned_lens(tmp_path / "lens", (0,), 2, 16)


# Runs trained through a lens.


@pytest.fixture(scope="module")
def through(tiny, store, tuned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("through")
    save_lens(tuned.lens, folder / "tuned.safetensors")
    with no_sync():
        run_cli("lens", "train", tiny / "store.zarr", "--kind", "whiten", "--out", folder / "whiten.safetensors", "--outlier-norm-ratio", 1.3, "--shrink", 0.1)  # fmt: skip
        for name in ("tuned", "whiten"):
            train(
                tiny / "store.zarr",
                folder / name,
                "--hook",
                "resid_post",
                "--lens",
                folder / f"{name}.safetensors",
            )
    return folder


@pytest.mark.parametrize("name", ["tuned", "whiten"])
def test_scores_in_raw_space_and_in_the_lens(through, store, name):
    found = evaluate_run(through / name, store, Wanted())
    subject, lens = load_subject(through / name, store), load_lens(through / f"{name}.safetensors")
    inside = subject.inside
    for i, layer in enumerate(subject.layers):
        (shard,) = subject.shards("holdout")
        x = shard.rows(layer, dtype=torch.float32)[torch.from_numpy(shard.passes[i])]
        y = lens.apply(x, torch.tensor([layer]))
        yhat = inside.decode(inside.encode(y, layer), layer)
        xhat = lens.invert(yhat, torch.tensor([layer]))
        for scores, target, restored in ((found.scores, x, xhat), (found.in_lens, y, yhat)):
            target, restored = target.double(), restored.double()
            fvu = ((target - restored) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()
            assert scores.layers[layer].fvu == pytest.approx(float(fvu), rel=1e-4)
    if name == "whiten":
        assert found.in_lens.mean.fvu != pytest.approx(found.scores.mean.fvu, rel=1e-3)
    assert found.in_lens.mean.l0 == found.scores.mean.l0
    assert found.as_json()["lens_space"]["condition"] == lens.conditions()


def test_the_model_gets_raw_rows(through, store, decoder):
    """Not rows of the lens's space: its loss stays that of the store's run of the model."""
    (scores,) = evaluate_patched(load_subject(through / "tuned", store), Patcher(decoder), n_tokens=60)
    (plain,) = evaluate_patched(load_subject(through / "whiten", store), Patcher(decoder), n_tokens=60)
    assert scores.layers[0].loss == plain.layers[0].loss
    assert scores.layers[0].change.value < scores.layers[0].zero_change.value


def test_the_report_shows_both_spaces(through, store, model, tmp_path):
    request = Request(n_examples=1, model_tokens=30, positions=("kept",), prompts=())
    analyse_and_write(through / "whiten", store, tmp_path / "out", request, model=model)
    assert "Through the lens" in (tmp_path / "out" / "report.html").read_text()
    rows = {r["layer"]: r for r in pq.read_table(tmp_path / "out" / "tables" / "reconstruction_lens.parquet").to_pylist()}  # fmt: skip
    raw = {
        r["layer"]: r
        for r in pq.read_table(tmp_path / "out" / "tables" / "reconstruction.parquet").to_pylist()
    }
    found = evaluate_run(through / "whiten", store, Wanted())
    for layer in ("0", "1"):
        assert rows[layer]["fvu"] == pytest.approx(found.in_lens.layers[int(layer)].fvu, rel=1e-5)
        assert raw[layer]["fvu"] == pytest.approx(found.scores.layers[int(layer)].fvu, rel=1e-5)
        assert rows[layer]["condition"] > 1
    cosines = pq.read_table(tmp_path / "out" / "tables" / "neighbour_cosines_lens.parquet").to_pylist()
    plain = pq.read_table(tmp_path / "out" / "tables" / "neighbour_cosines.parquet").to_pylist()
    assert cosines[0]["mean"] != pytest.approx(plain[0]["mean"], rel=1e-3)


def test_the_command_line(tiny, through, tmp_path, capsys, monkeypatch):
    from tests.conftest import make_decoder

    monkeypatch.setattr("analysis.models.load_model", lambda *_a, **_k: make_decoder())
    monkeypatch.setattr("analysis.models.load_tokenizer", lambda *_a, **_k: None)
    run_cli("lens", "train", tiny / "store.zarr", "--out", tmp_path / "t.safetensors", "--model", "x", "--tokens", 64, "--eval-tokens", 20, "--json", "--layers", "0")  # fmt: skip
    said = json.loads(capsys.readouterr().out)
    assert said["about"]["n_tokens"] == 64
    assert set(said["kl_before"]) == {"0"}
    write_tuned_lens(tmp_path / "lens")
    run_cli("lens", "import", tmp_path / "lens", tiny / "store.zarr", "--out", tmp_path / "i.safetensors")
    assert "condition number" in capsys.readouterr().out
    assert load_lens(tmp_path / "i.safetensors").about["imported"] == "lens"
    run_cli("eval", through / "whiten", tiny / "store.zarr", "--device", "cpu")
    assert "the same in the space of the lens" in capsys.readouterr().out
