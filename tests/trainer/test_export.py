import json
import re
from dataclasses import replace

import pytest
import torch
from huggingface_hub import constants

from actcache.errors import DamageError, NotFoundError, UnreachableError, UsageError
from tests.trainer import judges
from tests.trainer.fake_hub import serve
from tests.trainer.list_source import random_source
from tests.trainer.saes import N_LATENTS, PROVENANCE, WIDTH, K, compute, make_sae, relative
from trainer.checkpoint import load_sae
from trainer.config import TrainConfig
from trainer.export import hub
from trainer.export.files import write_torch
from trainer.export.formats import FORMATS, NAMES, check_exported, detect, export, load_for_export, read
from trainer.export.portable import inclusive_threshold, make_portable
from trainer.export.run import find_runs, write_run
from trainer.loop import train, train_many

NEAR = 1e-5
FORMS = [
    {},
    {"layers": (0, 3, 5), "latent_bias": True},
    {"standardise": "layer"},
    {"activation": "batchtopk"},
    {"activation": "relu", "latent_bias": True},
    {"form": "feature", "layers": (1, 2)},
    {"form": "crosscoder", "layers": (1, 2)},
    {"form": "transcoder", "out_width": 9},
    {"form": "transcoder", "skip": True, "standardise": "layer", "layers": (0, 4)},
]


def said(settings) -> str:
    return "-".join(map(str, settings.values())) or "topk"


# openai's and the paper's formats, whose code is on no index.


@pytest.mark.parametrize(
    "settings", [{}, {"latent_bias": True}, {"activation": "relu", "standardise": "layer"}], ids=said
)
def test_openai(settings, tmp_path):
    trained = make_sae(**settings)
    ours = compute(trained)
    export(trained, tmp_path / "out", "openai")
    acts, out = judges.openai(tmp_path / "out" / "autoencoder.pt", ours.x)
    assert relative(out, ours.xhat) <= NEAR
    assert relative(acts, ours.acts) <= NEAR
    assert torch.equal(acts > 0, ours.acts > 0)


@pytest.mark.parametrize("settings", [{"layers": (0, 3, 5)}, {"standardise": "layer"}], ids=said)
def test_mlsae(settings, tmp_path):
    trained = make_sae(**settings)
    ours = compute(trained)
    export(trained, tmp_path / "out", "mlsae")
    acts, out = judges.mlsae(tmp_path / "out", ours.x)
    assert relative(out, ours.xhat) <= NEAR
    assert relative(acts, ours.acts) <= NEAR
    assert torch.equal(acts > 0, ours.acts > 0)


def published(folder, *, prefix="", **changes):
    """A checkpoint as tim-lawson published them, and the rows it gives for some rows."""
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    encoder = torch.randn(64, WIDTH, generator=g)
    state = {
        "encoder.weight": encoder,
        "decoder.weight": (encoder / encoder.norm(dim=1, keepdim=True)).T.contiguous(),
        "pre_encoder_bias": torch.randn(WIDTH, generator=g) * 0.1,
    }
    config = {
        "auxk": 256,
        "dead_steps_threshold": 76,
        "dead_threshold": 0.001,
        "k": 4,
        "n_inputs": WIDTH,
        "n_latents": 64,
        "standardize": True,
    }
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file(state, folder / "model.safetensors")
    x = torch.randn(50, WIDTH, generator=g) * 5 + 1
    expected = judges.mlsae(folder, x)[1] if changes.get("standardize") is not False else None
    if prefix:
        more = {"transformer.weight": torch.zeros(3), "autoencoder.last_nonzero": torch.zeros(64)}
        save_file({prefix + n: t for n, t in state.items()} | more, folder / "model.safetensors")
    return x, expected


@pytest.mark.parametrize("prefix", ["", "autoencoder."])
def test_a_published_multi_layer_sae(prefix, tmp_path):
    x, expected = published(tmp_path / "hub", prefix=prefix)
    found = read(tmp_path / "hub")
    assert (found.name, found.width, found.n_latents, found.hooks) == ("mlsae", WIDTH, 64, ("resid_post",))
    write_run(found.make((0, 1, 2), found.provenance), tmp_path / "run")
    ours = load_sae(tmp_path / "run")
    assert ours.layers == (0, 1, 2)
    assert ours.config.k == 4
    assert relative(ours.decode(ours.encode(x)), expected) <= NEAR


def test_a_published_one_with_its_language_model_says_which(tmp_path):
    config = {"model_name": "EleutherAI/pythia-70m-deduped", "layers": [0, 1, 2, 3, 4, 5]}
    published(tmp_path / "hub", prefix="autoencoder.", expansion_factor=64, **config)
    found = read(tmp_path / "hub")
    assert found.provenance["model"]["name"] == "EleutherAI/pythia-70m-deduped"
    assert found.layers == (0, 1, 2, 3, 4, 5)


def test_one_that_was_trained_without_standardising(tmp_path):
    x, _ = published(tmp_path / "hub", standardize=False)
    write_run(read(tmp_path / "hub").make((2,), {}), tmp_path / "run")
    ours = load_sae(tmp_path / "run")
    assert relative(ours.decode(ours.encode(x)), judges.mlsae(tmp_path / "hub", x)[1]) <= NEAR


# Our own format, and round trips through the others.


@pytest.mark.parametrize("settings", FORMS, ids=said)
def test_ours_is_bit_for_bit(settings, tmp_path):
    trained = make_sae(**settings)
    export(trained, tmp_path / "out", "actcache")
    assert detect(tmp_path / "out") == "actcache"
    again = load_sae(tmp_path / "out")
    assert again.provenance == PROVENANCE
    assert again.layers == trained.layers
    layer = trained.layers[-1]
    assert torch.equal(compute(again, layer).xhat, compute(trained, layer).xhat)
    write_run(read(tmp_path / "out").make(trained.layers, {"other": 1}), tmp_path / "run")
    assert load_sae(tmp_path / "run").provenance == {"other": 1}
    assert torch.equal(compute(load_sae(tmp_path / "run"), layer).xhat, compute(trained, layer).xhat)


def refusal(trained, out, name, layer) -> str | None:
    try:
        export(trained, out, name, layer=layer)
    except UsageError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("settings", FORMS, ids=said)
def test_what_is_written_is_read_back_or_refused(name, settings, tmp_path):
    """In one layer, where the SAE has several and fixed numbers for each."""
    trained = make_sae(**settings)
    several = trained.n_slices == 1 and len(trained.layers) > 1
    layer = trained.layers[-1] if several and trained.transforms.tensors else None
    if refused := refusal(trained, tmp_path / "out", name, layer):
        assert "export" in refused or "sparsify has one width" in refused  # says what else to do
        assert list(tmp_path.iterdir()) == []
        return
    assert detect(tmp_path / "out") == name
    found = read(tmp_path / "out")
    assert found.layers == (trained.layers if layer is None else (layer,))
    assert found.form == trained.config.form
    assert found.hooks == ("resid_post",)
    assert found.provenance["plan"] == PROVENANCE["plan"]
    write_run(found.make(found.layers, found.provenance), tmp_path / "run")
    ours, back = compute(trained, layer), compute(load_sae(tmp_path / "run"), layer)
    assert torch.equal(back.acts > 0, ours.acts > 0)
    assert relative(back.xhat, ours.xhat) <= NEAR


def test_at_least_one_format_takes_every_form(tmp_path):
    for i, settings in enumerate(FORMS):
        trained = make_sae(**settings)
        refused = [refusal(trained, tmp_path / f"{i}-{name}", name, trained.layers[-1]) for name in FORMATS]
        assert None in refused or settings.get("out_width"), settings


def test_a_layer_of_an_sae_with_fixed_numbers_for_each(tmp_path):
    trained = make_sae((0, 3, 5), standardise="layer")
    with pytest.raises(UsageError, match="say for which layer"):
        export(trained, tmp_path / "out", "saelens")
    with pytest.raises(UsageError, match=r"layer 4: this SAE was trained on layers \[0, 3, 5\]"):
        export(trained, tmp_path / "out", "saelens", layer=4)
    for layer in trained.layers:
        sae, ours = make_portable(trained, layer), compute(trained, layer)
        pre = (ours.x - sae.b_in) @ sae.w_enc.T
        assert relative(judges.top(pre, K), ours.acts) <= NEAR
        assert relative(judges.top(pre, K) @ sae.w_dec + sae.b_out, ours.xhat) <= NEAR


def test_a_threshold_survives_the_other_way_to_compare():
    """Ours takes a >= threshold, other projects a > threshold: neighbours in float32."""
    trained = make_sae(activation="batchtopk")
    sae = make_portable(trained)
    assert sae.exclusive_threshold < sae.threshold
    assert inclusive_threshold(sae.exclusive_threshold) == sae.threshold
    relu = make_portable(make_sae(activation="relu"))
    assert (relu.threshold, relu.exclusive_threshold, inclusive_threshold(0.0)) == (0.0, 0.0, 0.0)


# What is said beside the weights.


def card_of(folder) -> str:
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_card_says_how_it_was_made(name, tmp_path):
    export(
        make_sae((0, 3)), tmp_path / "out", name, facts={"step": 1000, "rows": 8_192_000, "torch": "2.13.0"}
    )
    text = card_of(tmp_path / "out")
    for words in (
        "someone/a-model",
        "abc123",
        "f" * 64,
        "0123456789abcdef",
        "texts.jsonl",
        "8,192,000",
        "layers 0, 3",
        "pre  = W_enc (z - b)\n",
        f"the {K} largest of pre",
        "| n_latents | 40 |",
        "base_model: someone/a-model",
        "norm above 10 x",
    ):
        assert words in text, words
    carried = name in ("actcache", "saelens", "openai", "mlsae")
    assert ("does not standardise rows by itself" in text) is not carried
    assert re.search(r"load_sae|load_from_disk|load_dictionary|from_state_dict|from_pretrained", text)


@pytest.mark.parametrize("name", NAMES)
def test_without_the_model_nothing_names_it(name, tmp_path):
    export(make_sae(), tmp_path / "out", name, names_model=False)
    for path in (tmp_path / "out").iterdir():
        content = path.read_bytes()
        assert b"someone" not in content, path.name
        assert b"abc123" not in content, path.name
    assert "f" * 64 in card_of(tmp_path / "out")  # the digest of its weights stays: who has them can tell


def test_the_card_of_a_run_from_python_has_what_there_is(tmp_path):
    export(make_sae(provenance={}), tmp_path / "out", "saelens")
    assert "language model" not in card_of(tmp_path / "out")
    assert "base_model" not in card_of(tmp_path / "out")


# From runs.


def run_of(tmp_path, **settings):
    config = TrainConfig(n_latents=32, k=4, batch_rows=32, epochs=2, decay_frac=0.0, **settings)
    held = random_source(64, WIDTH, seed=1) if settings.get("eval_every_steps") else None
    train(random_source(210, WIDTH, epochs=2), config, tmp_path / "run", provenance=PROVENANCE, held_out=held)
    return tmp_path / "run"


def test_a_run_and_its_best_checkpoint(tmp_path):
    run = run_of(tmp_path, eval_every_steps=3, checkpoint_every_steps=3)
    trained, facts = load_for_export(run)
    assert (facts["step"], facts["rows"]) == (14, 420)
    export(trained, tmp_path / "result", "actcache", facts=facts)
    assert "| fvu |" in card_of(tmp_path / "result").replace("layer | ", "")
    assert torch.equal(load_sae(tmp_path / "result").sae.w_enc, load_sae(run).sae.w_enc)
    best, facts = load_for_export(run, "best")
    assert facts["scores"]["step"] == facts["step"]
    export(best, tmp_path / "best", "saelens", facts=facts)
    assert "| checkpoint | best |" in card_of(tmp_path / "best")
    with pytest.raises(UsageError, match="expected best, last or the number of a step"):
        load_for_export(run, "first")
    with pytest.raises(NotFoundError, match="no checkpoint 1000"):
        load_for_export(run, "1000")


def test_a_sweep_is_found_run_by_run(tmp_path):
    configs = {
        f"k={k}": TrainConfig(n_latents=32, k=k, batch_rows=32, epochs=1, decay_frac=0.0) for k in (2, 4)
    }
    train_many(random_source(100, WIDTH), configs, tmp_path / "sweep")
    assert list(find_runs(tmp_path / "sweep")) == ["k=2", "k=4"]
    assert find_runs(tmp_path / "sweep" / "k=2") == {"": tmp_path / "sweep" / "k=2"}
    with pytest.raises(NotFoundError, match="no run in"):
        find_runs(tmp_path)


# Bad input.


def test_a_folder_that_is_taken_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    export(make_sae(), tmp_path / "out", "saelens")  # an empty one will do
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(UsageError, match="is there already"):
        export(make_sae(seed=1), tmp_path / "out", "saelens")
    with pytest.raises(UsageError, match="is there already"):
        write_run(read(tmp_path / "out").make((3,), {}), tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    with pytest.raises(UsageError, match="format 'gguf': expected one of actcache, saelens"):
        export(make_sae(), tmp_path / "other", "gguf")


@pytest.mark.parametrize("name", FORMATS)
def test_damage_is_said(name, tmp_path):
    export(make_sae(), tmp_path / "out", name)
    weights = next(p for p in (tmp_path / "out").iterdir() if p.suffix in (".safetensors", ".pt"))
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(DamageError, match=weights.name):
        read(tmp_path / "out", name)
    weights.unlink()
    with pytest.raises(NotFoundError, match=weights.name):
        read(tmp_path / "out", name)


def test_what_is_no_sae_is_refused(tmp_path):
    with pytest.raises(NotFoundError, match="nowhere"):
        detect(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no SAE in a format known here"):
        detect(tmp_path)
    export(make_sae(), tmp_path / "out", "saelens")
    check_exported(tmp_path / "out")
    (tmp_path / "out" / "README.md").unlink()
    with pytest.raises(UsageError, match=r"has no README\.md"):
        check_exported(tmp_path / "out")


def test_code_in_a_torch_file_is_never_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harmed"), "w"))

    for name in ("ae.pt", "autoencoder.pt"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        write_torch(folder / name, {"encoder.weight": Harm()})
        with pytest.raises(DamageError, match="is not a file of tensors that torch can load safely"):
            read(folder)
    assert not (tmp_path / "harmed").exists()


def edited(folder, file, **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "file", "changes", "error", "words"),
    [
        ("saelens", "cfg.json", {"architecture": "gated"}, UsageError, "architecture 'gated'"),
        ("saelens", "cfg.json", {"k": None}, DamageError, "k is None"),
        (
            "saelens",
            "cfg.json",
            {"normalize_activations": "expected_average_only_in"},
            UsageError,
            "save_inference_model",
        ),
        ("saelens", "cfg.json", {"reshape_activations": "hook_z"}, UsageError, "heads"),
        ("sparsify", "cfg.json", {"activation": "groupmax"}, UsageError, "groupmax"),
        ("sparsify", "cfg.json", {"skip_connection": True}, DamageError, "no tensor 'W_skip'"),
        (
            "dictionary_learning",
            "config.json",
            {"trainer": {"dict_class": "GatedAutoEncoder"}},
            UsageError,
            "Gated",
        ),
        ("mlsae", "config.json", {"tuned_lens": True}, UsageError, "tuned lens"),
        ("mlsae", "config.json", {"k": "four"}, DamageError, "k is 'four'"),
    ],
)
def test_what_we_have_not_is_refused_by_name(name, file, changes, error, words, tmp_path):
    export(make_sae(), tmp_path / "out", name)
    edited(tmp_path / "out", file, **changes)
    with pytest.raises(error, match=words):
        read(tmp_path / "out", name)


def test_thresholds_of_their_own_and_shapes_that_do_not_fit(tmp_path):
    from safetensors.torch import load_file, save_file

    export(make_sae(activation="batchtopk"), tmp_path / "out", "saelens")
    path = tmp_path / "out" / "sae_weights.safetensors"
    good = load_file(path)
    save_file(good | {"threshold": torch.rand(N_LATENTS)}, path)
    with pytest.raises(UsageError, match="every latent has a threshold of its own"):
        read(tmp_path / "out")
    save_file(good | {"b_dec": torch.zeros(3)}, path)
    with pytest.raises(DamageError, match=r"b_dec has shape \[3\], expected \[12\]"):
        read(tmp_path / "out")
    save_file(good | {"b_dec": torch.full((WIDTH,), torch.nan)}, path)
    with pytest.raises(DamageError, match="b_dec holds NaN"):
        read(tmp_path / "out")


def test_layers_that_do_not_fit(tmp_path):
    export(make_sae((1, 2), form="crosscoder"), tmp_path / "out", "saelens")
    with pytest.raises(UsageError, match=r"2 layers side by side, 24 numbers; layers \[1\] do not fit"):
        read(tmp_path / "out").make((1,), {})


@pytest.mark.parametrize(
    ("name", "form", "layers", "hooks"),
    [
        ("layers.3", "stacked", (3,), ("resid_post",)),
        ("gpt_neox.layers.12.mlp", "stacked", (12,), ("mlp_out",)),
        ("h.0.mlp", "transcoder", (0,), ("mlp_in", "mlp_out")),
        ("h.7.attn", "stacked", (7,), ("attn_out",)),
        ("layers.3.strange", "stacked", (3,), ("layers.3.strange",)),  # which no store has: it is asked for
        ("experiment-2", "stacked", (), ()),
    ],
)
def test_sparsify_names_the_place_in_the_folder(name, form, layers, hooks, tmp_path):
    export(make_sae(form=form), tmp_path / name, "sparsify")
    config = json.loads((tmp_path / name / "cfg.json").read_text())
    config.pop("actcache")
    (tmp_path / name / "cfg.json").write_text(json.dumps(config))
    found = read(tmp_path / name)
    assert (found.form, found.layers, found.hooks) == (form, layers, hooks)


# The hub.


@pytest.fixture
def server():
    with serve() as running:
        yield running


@pytest.fixture(autouse=True)
def _login(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.utils._auth._get_token_from_environment", lambda: "hf_test")


def test_up_and_down_again(server, tmp_path):
    trained = make_sae()
    export(trained, tmp_path / "out", "mlsae")
    commit = hub.push(tmp_path / "out", "you/an-sae", private=True, endpoint=server.endpoint)
    assert commit.startswith(server.endpoint)
    assert server.private == {"you/an-sae": True}
    assert server.repos["you/an-sae"] == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    hub.push(tmp_path / "out", "you/an-sae", endpoint=server.endpoint)  # again: another commit
    sha = hub.download("you/an-sae", tmp_path / "down", endpoint=server.endpoint)
    assert sha == server.sha("you/an-sae")
    write_run(read(tmp_path / "down").make((3,), {}), tmp_path / "run")
    assert relative(compute(load_sae(tmp_path / "run")).xhat, compute(trained).xhat) <= NEAR


def test_what_the_hub_says_is_passed_on(server, tmp_path, monkeypatch):
    export(make_sae(), tmp_path / "out", "saelens")
    with pytest.raises(NotFoundError, match="you/none: the hub has no such repository"):
        hub.download("you/none", tmp_path / "down", endpoint=server.endpoint)
    with pytest.raises(UsageError, match="is not the name of a repository"):
        hub.push(tmp_path / "out", "a/b/c", endpoint=server.endpoint)
    for status, error, words in (
        (403, UsageError, "refuses"),
        (401, UsageError, "log in"),
        (500, UnreachableError, "failed"),
    ):
        server.status = status
        with pytest.raises(error, match=words):
            hub.push(tmp_path / "out", "you/an-sae", endpoint=server.endpoint)
        with pytest.raises(error, match=words):
            hub.download("you/an-sae", tmp_path / "down", endpoint=server.endpoint)
    assert server.repos == {}
    with pytest.raises(UnreachableError, match="cannot be reached"):
        hub.push(tmp_path / "out", "you/an-sae", endpoint="http://127.0.0.1:9")


def test_names_of_repositories():
    assert hub.is_repository("tim-lawson/mlsae-pythia-70m-deduped-x64-k32")
    assert not any(map(hub.is_repository, ("run", "./run/x", "/tmp/x", "a/b/c", "a/", "/b", "~/x")))
    assert constants.ENDPOINT.startswith("http")


def test_provenance_is_not_changed_by_leaving_the_model_out(tmp_path):
    trained = make_sae()
    export(trained, tmp_path / "out", "actcache", names_model=False)
    assert trained.provenance["model"]["name"] == "someone/a-model"
    assert replace(trained).provenance == PROVENANCE
