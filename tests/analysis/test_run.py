"""A whole analysis of a tiny run: what it says, what it writes, what it holds in memory, and how runs stand side by side."""

import json
import re
import shutil
import weakref
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import actcache
from actcache.errors import DamageError, NotFoundError, UsageError
from analysis import latents as latents_module
from analysis.findings_tables import findings_tables
from analysis.metrics import evaluate
from analysis.output import analyse_and_write
from analysis.prompts import prompt_latents
from analysis.reporter import Reporter
from analysis.run import Request, analyse
from analysis.subject import load_subject
from analysis.summary import read_summary
from tests.analysis.conftest import train
from tests.conftest import no_sync

MARKUP = 'peace <i onclick="x()">&amp; war</i>'
REQUEST = Request(
    model_tokens=40,
    prompts=("the state of the union", MARKUP),
    n_examples=4,
    context=3,
    min_tokens=2,
    n_nearest=3,
)


@pytest.fixture(scope="module")
def found(subject, model, tmp_path_factory):
    stages = []
    reporter = Reporter(on_stage=lambda name, total, unit: stages.append([name, total, unit, 0]), on_advance=lambda n: advance(stages, n))  # fmt: skip
    made = analyse(subject, tmp_path_factory.mktemp("findings"), REQUEST, model, reporter=reporter)
    return made, stages


def advance(stages, n):
    stages[-1][3] += n


@pytest.fixture(scope="module")
def written(tiny, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis")
    store = actcache.open(tiny / "store.zarr")
    with no_sync():
        train(tiny / "store.zarr", folder / "wide", "--hook", "resid_post", "--expansion", "8", "--seed", "1")
    analyse_and_write(tiny / "run", store, folder / "out", REQUEST, model=model, compare=[folder / "wide"])
    return folder / "out"


def test_reconstruction_equals_the_evaluation_of_a_stream(found, subject):
    with subject.store.stream(
        batch_size=50, hook="resid_post", split="holdout", dtype=torch.float32, **subject.filters
    ) as source:
        expected = evaluate(subject.sae, source)
    for layer, scores in expected.layers.items():
        np.testing.assert_allclose(list(found[0].evaluation.layers[layer]), list(scores), rtol=1e-6)
    assert np.array_equal(found[0].evaluation.latents.counts, expected.latents.counts)
    np.testing.assert_allclose(found[0].evaluation.latents.totals, expected.latents.totals, rtol=1e-6)


def test_progress_reaches_the_end_of_every_stage(found):
    for name, total, unit, done in found[1]:
        assert unit
        if name == "model with patches":
            assert total <= done < total + 16
        else:
            assert done == total > 0, name


def test_the_decomposition_is_of_tokens_kept_at_all_layers(found, subject):
    (shard,) = subject.shards("holdout")
    assert found[0].variance["mass"].n_tokens == shard.passes.all(0).sum() < len(shard)
    assert found[0].n_tokens == len(shard)
    for shares in found[0].variance.values():
        assert shares.identity < 1e-12
        assert shares.min_tokens == 2


def test_the_trace_ends_where_the_counts_do(found):
    trace, latents = found[0].trace, found[0].evaluation.latents
    assert [p.n_tokens for p in trace] == sorted({p.n_tokens for p in trace})
    assert trace[-1].n_tokens == found[0].n_tokens
    assert trace[-1].layer_std.n == latents.is_alive.sum()
    assert trace[-1].layer_std.mean == pytest.approx(np.nanmean(latents.std))


def test_prompts_are_what_the_model_and_the_sae_say(found, subject, model, decoder):
    prompt = found[0].model.prompts[0]
    ids = model.tokenizer("the state of the union", add_special_tokens=False)["input_ids"]
    assert prompt.tokens.tolist() == ids
    assert prompt.is_kept.tolist() == [False] + [True] * (len(ids) - 1)
    acts = decoder.capture(torch.tensor([ids]), {"resid_post": subject.layers})
    dense = np.zeros((len(ids), 2, subject.n_latents))
    for i, layer in enumerate(subject.layers):
        code = subject.sae.encode(acts["resid_post", layer][0])
        np.add.at(dense[:, i], (np.arange(len(ids))[:, None], code.indices.numpy()), code.values.numpy())
    e = prompt.entries
    got = np.zeros_like(dense)
    got[e.token, e.layer_i, e.latent] = e.activation
    np.testing.assert_allclose(got, np.where(dense > 1e-3, dense, 0), rtol=1e-6)
    np.testing.assert_allclose(prompt.latents.totals, dense[1:].sum(0), rtol=1e-5, atol=1e-6)


def test_a_prompt_of_excluded_tokens_only_is_refused(subject, model):
    for text in ("", "t"):
        with pytest.raises(UsageError, match="write more"):
            prompt_latents(subject, model, text)


def test_memory_is_one_shard_of_latents_and_two_layers_of_rows(subject, tmp_path, monkeypatch):
    """However many shards there are: 2 here, and never two alive at once, nor more than two layers' rows."""
    alive, most = weakref.WeakSet(), {"codes": 0, "rows": 0}
    read = latents_module.LatentStore._read

    def watched(self, file):
        codes = read(self, file)
        proxy = Holder(codes)
        alive.add(proxy)
        keep.append((weakref.ref(codes.activation), proxy))
        return codes

    class Holder:
        def __init__(self, codes):
            self.ref = weakref.ref(codes.activation)

    keep = []
    rows_alive = []
    shard_rows = type(next(subject.shards("train")))
    read_rows = shard_rows.rows

    def watched_rows(self, *args, **kwargs):
        rows = read_rows(self, *args, **kwargs)
        rows_alive.append(weakref.ref(rows))
        most["rows"] = max(most["rows"], sum(ref() is not None for ref in rows_alive))
        most["codes"] = max(most["codes"], sum(ref() is not None for ref, _ in keep))
        return rows

    monkeypatch.setattr(latents_module.LatentStore, "_read", watched)
    monkeypatch.setattr(shard_rows, "rows", watched_rows)
    analyse(subject, tmp_path, Request(split="train", n_examples=2))
    assert len(keep) == 4  # two shards, read with rows and for contexts
    assert 1 <= most["codes"] <= 1
    assert 2 <= most["rows"] <= 3


VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


class Page(HTMLParser):
    """What a page holds: tags, ids, links, text, whatever it would fetch, and tags that do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.targets, self.fetched, self.handlers = [], [], [], [], []
        self.open, self.misplaced, self.texts = [], [], []
        self.feed(text)
        self.close()
        self.misplaced += self.open

    def handle_starttag(self, tag, attrs):
        self._note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._note(tag, attrs)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.misplaced.append(tag)

    def handle_data(self, data):
        self.texts.append(data)

    def _note(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"<{tag}> says something twice: {attrs}"
        self.tags.append(tag)
        self.handlers += [name for name in attributes if name.startswith("on")]
        if "id" in attributes:
            self.ids.append(attributes["id"])
        for name, value in attributes.items():
            self.targets += re.findall(r"url\(#([^)]+)\)", value or "")
            if name not in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                continue
            if value.startswith("#"):
                self.targets.append(value[1:])
            elif not value.startswith("data:"):
                self.fetched.append(value)


def test_the_report_is_one_page_that_fetches_nothing(written):
    text = (written / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == []
    assert "@import" not in text
    assert "url(http" not in text
    assert page.tags.count("svg") == len(list((written / "figures").glob("*.svg"))) > 12
    assert 'name="viewport"' in text
    assert "prefers-color-scheme:dark" in text
    assert "@media print" in text
    for name in ("reconstruction", "loss", "layers", "variance", "stream", "dictionary", "examples", "prompts", "comparison", "method"):  # fmt: skip
        assert name in page.ids


def test_the_report_is_sound_html(written):
    """Tags close in order, ids are there once and match what refers to them, and text from elsewhere stays text."""
    text = (written / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.misplaced == []
    assert len(page.ids) == len(set(page.ids))
    assert all(re.fullmatch(r"[A-Za-z][\w.-]*", name) for name in page.ids)
    assert set(page.targets) <= set(page.ids)
    assert page.handlers == []
    assert "i" not in page.tags
    assert page.tags.count("script") == 1
    assert MARKUP in "".join(page.texts)


def test_every_figure_has_a_caption_with_its_n(written):
    text = (written / "report.html").read_text(encoding="utf-8")
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text, re.DOTALL)
    assert len(captions) == text.count("<figure>") > 12
    for caption in captions:
        assert re.search(r"n = [\d,]+", caption), caption
        assert len(caption) > 60 or "runs" in caption


def test_pictures_take_the_pages_colours(written):
    for path in (written / "figures").glob("*.svg"):
        svg = path.read_text()
        assert "currentColor" in svg
        assert "#010203" not in svg
        assert "#000000" not in svg.replace("fill: #000000; opacity: 0", "")


def test_every_table_is_there_twice_and_says_the_same(written, found):
    names = {table.name for table in findings_tables(found[0])} | {"comparison"}
    assert {p.stem for p in (written / "tables").glob("*.csv")} == names
    for name in names:
        header, *lines = (written / "tables" / f"{name}.csv").read_text(encoding="utf-8").splitlines()
        table = pq.read_table(written / "tables" / f"{name}.parquet")
        assert header.split(",") == table.schema.names
        assert table.num_rows > 0
        if name != "prompts":  # whose texts may hold line ends
            assert len(lines) == table.num_rows


def test_table_of_spreads(found):
    """Mean, variance, deviation and standard error over alive latents, as numpy has them."""
    table = next(t for t in findings_tables(found[0]) if t.name == "layer_std")
    rows = {row["quantity"]: row for row in table.as_arrow().to_pylist()}
    latents = found[0].evaluation.latents
    std = latents.std[latents.is_alive]
    assert rows["layer_std"]["n"] == len(std)
    assert rows["layer_std"]["mean"] == pytest.approx(std.mean())
    assert rows["layer_std"]["var"] == pytest.approx(std.var(ddof=1))
    assert rows["layer_std"]["sem"] == pytest.approx(std.std(ddof=1) / len(std) ** 0.5)
    assert rows["layer_std / span"]["mean"] == pytest.approx(std.mean())  # layers 0 and 1
    assert rows["n_layers"]["mean"] == pytest.approx(latents.n_layers[latents.is_alive].mean())


def test_the_dataset_can_be_published(written, subject):
    latents = pq.read_table(written / "dataset" / "latents.parquet")
    assert latents.num_rows == subject.n_latents
    row = latents.slice(int(np.argmax(latents["count"].to_numpy())), 1).to_pylist()[0]
    assert sum(row["counts"]) == row["count"]
    assert sum(row["totals"]) == pytest.approx(row["total"])
    assert sum(row["probs"]) == pytest.approx(1)
    card = (written / "dataset" / "README.md").read_text(encoding="utf-8")
    front = card.split("---\n")[1]
    for name in ("latents.parquet", "examples.parquet"):
        assert f"data_files: {name}" in front
        assert (written / "dataset" / name).exists()
    for column in latents.schema.names:
        assert f"`{column}`" in card
    for column in pq.read_schema(written / "dataset" / "examples.parquet").names:
        assert f"`{column}`" in card


def test_runs_stand_side_by_side(written, tiny, model, tmp_path):
    table = pq.read_table(written / "tables" / "comparison.parquet").to_pylist()
    assert [row["run"] for row in table] == ["run", "wide"]
    assert [row["expansion"] for row in table] == [4, 8]
    assert read_summary(written / "compare" / "wide").scores["fvu"] == table[1]["fvu"]
    assert "sweep_n_latents_fvu" in {p.stem for p in (written / "figures").glob("*.svg")}
    again = analyse_and_write(
        tiny / "run", actcache.open(tiny / "store.zarr"), tmp_path / "again", REQUEST, latents=written / "latents", compare=[written / "compare" / "wide"]
    )  # fmt: skip
    assert again.scores["fvu"] == table[0]["fvu"]
    assert "loss_change" not in again.scores
    assert not (tmp_path / "again" / "latents").exists()
    rows = pq.read_table(tmp_path / "again" / "tables" / "comparison.parquet").to_pylist()
    assert rows[0]["loss_change"] is None
    assert rows[1]["loss_change"] is not None


def test_cosines_within_and_between_dictionaries(written, tiny):
    store = actcache.open(tiny / "store.zarr")
    wide = load_subject(written.parent / "wide", store).directions
    mine = load_subject(tiny / "run", store).directions
    rows = {(r["of"], r["with"]): r for r in pq.read_table(written / "tables" / "mmcs.parquet").to_pylist()}
    assert set(rows) == {
        ("all latents", "each other"),
        ("alive latents", "each other"),
        ("run", "wide"),
        ("wide", "run"),
    }
    cosines = mine.double() @ wide.double().T
    assert rows["run", "wide"]["mean"] == pytest.approx(float(cosines.amax(1).mean()), rel=1e-5)
    assert rows["wide", "run"]["mean"] == pytest.approx(float(cosines.amax(0).mean()), rel=1e-5)
    assert rows["all latents", "each other"]["n"] == len(mine)


def test_summaries_that_cannot_be_read(written, tmp_path):
    with pytest.raises(NotFoundError, match="actcache analyze RUN STORE"):
        read_summary(tmp_path)
    shutil.copy(written / "summary.json", tmp_path)
    path = tmp_path / "summary.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 7'))
    with pytest.raises(UsageError, match="format 7"):
        read_summary(tmp_path)
    path.write_text("[")
    with pytest.raises(DamageError, match="run 'actcache analyze' again"):
        read_summary(tmp_path)


def test_without_the_model_what_needs_it_is_left_out_and_said(subject, tiny, tmp_path):
    store = actcache.open(tiny / "store.zarr")
    analyse_and_write(tiny / "run", store, tmp_path / "out", Request(n_examples=2))
    text = (tmp_path / "out" / "report.html").read_text()
    assert "the model was not at hand" in text
    assert not (tmp_path / "out" / "tables" / "loss.csv").exists()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["scores"]["fvu"] > 0
