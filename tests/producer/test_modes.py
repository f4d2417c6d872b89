"""Stores of every way to read and pack text: what is stored is what the model gives for that text, and the plan says how."""

import json

import numpy as np
import pytest
import torch

import actcache
from actcache.errors import CorpusError, ModelError, PlanMismatchError, UsageError
from actcache.producer.corpus import Fields, choose_fields, open_corpus
from actcache.store.arrays import NO_DOCUMENT
from actcache.store.objects import LocalObjects
from actcache.store.open import Catalog
from actcache.store.verify import find_problems
from tests.conftest import (
    SEPARATOR,
    Kit,
    make_decoder,
    read_texts,
    small_settings,
    train_tokenizer,
    write_corpus,
)

HOOKS = ("resid_post", "mlp_in", "mlp_out", "attn_out")
EXACT = {"dtype": "float32", "hooks": HOOKS, "n_tokens": None}


@pytest.fixture(autouse=True)
def _fast(fast_disk):
    """No test here cuts the power."""


def documents_of(store):
    """(document number, token ids, {(hook, layer): rows}) of every part of a document in a sequence."""
    for q in range(store.plan.grid.n_sequences):
        row = store.document[q]
        for d in np.unique(row[row != NO_DOCUMENT]):
            at = np.flatnonzero(row == d)
            yield int(d), store.tokens[q, at].astype(np.int64), (q, at)


def rows_at(store, q, at):
    return {
        (hook, layer): store.read(layer=layer, hook=hook, sequences=q, positions=at.tolist())[0]
        for hook in store.hooks
        for layer in store.layers_of(hook)
    }


def check_against_documents_alone(store):
    """Every stored row equals the model run on its document's part alone."""
    decoder = make_decoder()
    n = 0
    for _d, ids, (q, at) in documents_of(store):
        alone = decoder.capture(torch.from_numpy(ids)[None], dict.fromkeys(store.hooks, (0, 1)))
        for key, rows in rows_at(store, q, at).items():
            torch.testing.assert_close(rows, alone[key][0], rtol=2e-5, atol=2e-5)
            n += len(rows)
    assert n == store.n_tokens * 2 * len(store.hooks)


def problems(root):
    return find_problems(Catalog(LocalObjects(root)), threads=1)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("separator", ["auto", "bos", "none"])
def test_isolated_documents_are_stored_as_if_run_alone(kit, tmp_path, bos, separator):
    out = tmp_path / "s.zarr"
    changes = {"isolate_documents": True, "exclude_first": 2, "bos": bos, "separator": separator}
    kit.build(small_settings(out, **EXACT, **changes))
    store = actcache.open(out)
    check_against_documents_alone(store)
    assert problems(out) == []
    special = store.plan.request.tokenizer.special_ids
    for _d, ids, (q, at) in documents_of(store):
        expected = (np.arange(len(at)) >= 2) & ~np.isin(ids, special)
        assert store.keep[q, at].tolist() == expected.tolist()
    assert any((np.unique(row[row != NO_DOCUMENT]).size > 1) for row in store.document)
    begins = [ids[0] for d, ids, (q, at) in documents_of(store) if at[0] > bos]
    n_separators = sum(i == 0 for i in begins)  # the tokenizer's one special token has the id 0
    assert (n_separators > 5) == (separator != "none")


def test_packed_documents_do_see_each_other(kit, tmp_path):
    """What isolation is for: without it a document's rows depend on the one before."""
    kit.build(small_settings(tmp_path / "s.zarr", **EXACT))
    with pytest.raises(AssertionError):
        check_against_documents_alone(actcache.open(tmp_path / "s.zarr"))


@pytest.mark.parametrize("bos", [False, True])
def test_a_document_in_each_sequence(kit, tmp_path, bos):
    out = tmp_path / "s.zarr"
    uneven = [text[: 30 + 10 * i] for i, text in enumerate(read_texts(24, 300))]
    kit = Kit(kit.tokenizer, write_corpus(tmp_path / "c", uneven))
    kit.build(small_settings(out, **EXACT | {"n_tokens": 500}, packing="document", seq_len=64, bos=bos))
    store = actcache.open(out)
    check_against_documents_alone(store)
    assert problems(out) == []
    text = store.plan.text
    texts = list(kit.corpus.sources[0].documents())
    lengths = []
    for d, ids, (q, at) in documents_of(store):
        assert set(store.document[q]) <= {d, NO_DOCUMENT}
        assert at.tolist() == list(range(len(at)))  # padding comes after, and has no row
        whole = [*([0] if bos else []), 0, *kit.tokenizer(texts[d])["input_ids"]]
        assert ids.tolist() == whole[:64]
        lengths.append(len(whole))
    assert text.n_tokens == store.n_tokens == sum(min(64, n) for n in lengths)
    assert text.n_tokens_cut == sum(max(0, n - 64) for n in lengths) > 0
    assert 500 <= text.n_tokens < 564
    assert (store.keep & (store.document == NO_DOCUMENT)).sum() == 0
    assert any(n < 64 for n in lengths)


def test_module_hooks_are_captures_of_their_own_aligned_row_for_row(kit, tmp_path):
    hooks = ("resid_post", "gpt_neox.layers.{}.mlp.dense_h_to_4h:out", "layers.*.attention.dense:in")
    kit.build(small_settings(tmp_path / "s.zarr", dtype="float32", hooks=hooks))
    store, decoder = actcache.open(tmp_path / "s.zarr"), make_decoder()
    names = {
        "resid_post": ("resid_post", 16),
        "mlp.dense_h_to_4h.out": ("layers.*.mlp.dense_h_to_4h:out", 32),
        "attention.dense.in": ("layers.*.attention.dense:in", 16),
    }
    assert set(store.hooks) == set(names)
    expected = decoder.capture(
        torch.from_numpy(store.tokens.astype(np.int64)), {hook: (0, 1) for hook, _width in names.values()}
    )
    for name, (hook, width) in names.items():
        capture = Catalog(LocalObjects(tmp_path / "s.zarr")).captures[name].capture
        assert (capture.hook, capture.width) == (hook, width)
        for layer in (0, 1):
            torch.testing.assert_close(
                store.read(layer=layer, hook=name), expected[hook, layer], rtol=2e-5, atol=2e-5
            )
    with store.stream(hook=list(names), batch_size=64) as stream:
        batch = next(iter(stream))
    for name in names:
        for i in range(64):
            q, t, layer = (int(x[i]) for x in (batch.sequence, batch.position, batch.layer))
            assert torch.equal(
                batch.hooks[name][i], store.read(layer=layer, hook=name, sequences=q, positions=t)[0, 0]
            )
    assert problems(tmp_path / "s.zarr") == []


# Corpora.


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_mixture_leads_back_to_its_sources(kit, tmp_path):
    texts = {"a": read_texts(24, 120), "b": [text[::-1] for text in read_texts(24, 400)]}
    for name, some in texts.items():
        write_lines(tmp_path / f"{name}.jsonl", [{"text": text} for text in some])
    corpus = open_corpus([f"{tmp_path}/a.jsonl:0.25", f"{tmp_path}/b.jsonl:0.75"])
    out = tmp_path / "s.zarr"
    Kit(kit.tokenizer, corpus).build(small_settings(out, n_tokens=2048, holdout_frac=0.1))
    store = actcache.open(out)
    plan = store.plan
    a, b = plan.request.corpus.sources
    assert (a.name, a.weight, b.name, b.weight) == ("a.jsonl", 0.25, "b.jsonl", 0.75)
    assert [source.n_tokens for source in plan.text.sources] == [
        int((store.document % 2 == c).sum()) for c in (0, 1)
    ]
    assert abs(plan.text.sources[0].n_tokens / 2048 - 0.25) < 0.1
    pieces: dict[int, list[int]] = {}
    for d, ids, _at in documents_of(store):
        pieces.setdefault(d, []).extend(ids.tolist())
        source = texts["ab"[d % 2]]
        assert d // 2 < plan.text.sources[d % 2].n_documents_read <= len(source)
        assert kit.tokenizer.decode(ids[ids != 0])[:-3] in source[d // 2]  # but for halves of characters
    assert len(pieces) > 10
    other = open_corpus([f"{tmp_path}/a.jsonl:0.3", f"{tmp_path}/b.jsonl:0.7"])
    with pytest.raises(PlanMismatchError, match=r"corpus\.sources\.0\.weight is 0\.25 there and 0\.3 here"):
        Kit(kit.tokenizer, other).build(small_settings(out, n_tokens=2048, holdout_frac=0.1))


def test_weights_and_a_number_of_tokens_belong_together(kit, tmp_path):
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [{"text": text} for text in read_texts(24, 120)])
    weighted = open_corpus([f"{tmp_path}/{name}.jsonl:1" for name in "ab"])
    plain = open_corpus([tmp_path / f"{name}.jsonl" for name in "ab"])
    with pytest.raises(UsageError, match=r"weights: shares are of a number of tokens\. Give --tokens"):
        Kit(kit.tokenizer, weighted).build(small_settings(tmp_path / "s.zarr", n_tokens=None))
    with pytest.raises(UsageError, match="no weights: the first would give all"):
        Kit(kit.tokenizer, plain).build(small_settings(tmp_path / "s.zarr"))
    Kit(kit.tokenizer, plain).build(small_settings(tmp_path / "s.zarr", n_tokens=None))
    store = actcache.open(tmp_path / "s.zarr")
    assert [source.n_documents_read for source in store.plan.text.sources] == [24, 24]
    assert store.plan.text.n_documents_read == len(np.unique(store.document)) - 1 == 48  # all but padding


def test_conversations(tmp_path):
    tokenizer = train_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}" + SEPARATOR + "{{ m.role }}\n{{ m.content }}{% endfor %}" + SEPARATOR
    )
    talks = [
        [{"role": "user", "content": text[:40]}, {"role": "assistant", "content": text[40:]}]
        for text in read_texts(24, 120)
    ]
    path = write_lines(tmp_path / "talks.jsonl", [{"messages": talk} for talk in talks])
    corpus = open_corpus(path, choose_fields(tokenizer, 300, chat_template="tokenizer"))
    out = tmp_path / "s.zarr"
    Kit(tokenizer, corpus).build(small_settings(out, n_tokens=None, seq_len=96))
    store = actcache.open(out)
    request = store.plan.request
    (source,) = request.corpus.sources
    assert (source.kind, source.column, source.separator_id) == ("chat", "messages", None)
    assert not store.keep[store.tokens == 0].any()  # the template's markers are special tokens
    found: dict[int, list] = {}
    for d, ids, _at in documents_of(store):
        found.setdefault(d, []).append(ids)
    whole = {d: parts[0] for d, parts in found.items() if len(parts) == 1}
    assert whole
    for d, ids in whole.items():
        expected = tokenizer.apply_chat_template(talks[d], tokenize=False)
        assert tokenizer.decode(ids) == expected
        assert ids[0] == ids[-1] == 0
    tokenizer.chat_template += " "
    changed = open_corpus(path, choose_fields(tokenizer, 300, chat_template="tokenizer"))
    with pytest.raises(PlanMismatchError, match=r"tokenizer\.chat_template is '.*\.\.\. there"):
        Kit(tokenizer, changed).build(small_settings(out, n_tokens=None, seq_len=96))


@pytest.mark.parametrize("form", ["column", "bin", "npy"])
def test_tokenised_already_it_is_the_same_store(kit, tmp_path, form):
    """The ids of the texts with their separators give the rows that the texts give."""
    kit.build(small_settings(tmp_path / "text.zarr"))
    texts = list(kit.corpus.sources[0].documents())
    ids = [[0, *found] for found in kit.tokenizer(texts)["input_ids"]]
    fields = Fields(n_ids=300, end_id=0)
    if form == "column":
        path = write_lines(tmp_path / "ids.jsonl", [{"input_ids": row} for row in ids])
        fields = Fields(kind="ids", column="input_ids", n_ids=300)
    elif form == "bin":
        path = tmp_path / "ids.bin"
        np.concatenate([*ids, [0]])[1:].astype(np.uint16).tofile(path)  # with the EOS behind each
    else:
        path = tmp_path / "ids.npy"
        np.save(path, np.concatenate([*ids, [0]])[1:].astype(np.int32))
    Kit(kit.tokenizer, open_corpus(path, fields)).build(small_settings(tmp_path / "ids.zarr"))
    text, found = (actcache.open(tmp_path / name) for name in ("text.zarr", "ids.zarr"))
    (source,) = found.plan.request.corpus.sources
    assert (source.kind, source.separator_id) == ("ids", None)
    assert source.token_dtype == ("uint16" if form == "bin" else None)
    assert source.column == ("input_ids" if form == "column" else None)
    assert (found.document == text.document).all()
    if form == "column":
        assert (found.tokens == text.tokens).all()
        assert torch.equal(found.read(layer=1), text.read(layer=1))
    else:  # an EOS ends a document there and begins it here
        for d, tokens, _at in documents_of(found):
            assert set(np.flatnonzero(tokens == 0)) <= {len(tokens) - 1}
            of_text = text.tokens[text.document == d]
            assert len(tokens) < 2 or tokens[0] in of_text
    assert not found.keep[found.tokens == 0].any()


def test_a_corpus_that_is_too_short_is_taken_as_far_as_it_goes_if_that_is_asked(kit, tmp_path):
    out = tmp_path / "s.zarr"
    with pytest.raises(CorpusError, match=r"the corpus is too short.*or give --allow-short"):
        kit.build(small_settings(out, n_tokens=100_000))
    seen = []
    reporter_settings = small_settings(out, n_tokens=100_000, allow_short=True)
    from actcache.producer.build import BuildReporter

    kit.build(
        reporter_settings,
        reporter=BuildReporter(
            on_forecast=lambda grid, size: seen.append((grid.n_sequences, size.raw_bytes))
        ),
    )
    store = actcache.open(out)
    assert store.is_complete
    plan = store.plan
    assert plan.request.n_tokens == 100_000
    assert plan.text.n_tokens == store.n_tokens < 2500
    assert plan.text.n_documents_read == 24
    assert [n for n, _bytes in seen] == [6250, plan.grid.n_sequences]  # the size was said again
    assert plan.grid.n_sequences < 200
    whole = tmp_path / "whole.zarr"
    kit.build(small_settings(whole, n_tokens=None))
    assert store.n_tokens == actcache.open(whole).n_tokens
    assert kit.build(small_settings(out, n_tokens=100_000, allow_short=True)).was_complete


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_tokens": None, "allow_short": True}, "allow_short without tokens"),
        ({"isolate_documents": True, "packing": "document"}, "a sequence holds one document already"),
        ({"hooks": ("mlp_out", "mlp_out")}, "expected each hook once"),
        ({"hooks": ("layers.*.mlp", "layers.*.mlp:out")}, "expected each hook once"),
        ({"hooks": ("layers.*.nose:out",)}, "has no module 'nose'"),
        ({"seq_len": 129}, "seq_len=129: random-neox has 128 positions"),
    ],
)
def test_settings_that_cannot_be_used(kit, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        kit.build(small_settings(tmp_path / "s.zarr", **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_isolate_is_refused_before_anything_is_written(kit, tmp_path, monkeypatch):
    decoder = make_decoder()
    monkeypatch.setattr(decoder, "_isolating", lambda *_: {})
    with pytest.raises(ModelError, match="documents cannot be isolated"):
        kit.build(small_settings(tmp_path / "s.zarr", isolate_documents=True), decoder)
    assert list(tmp_path.iterdir()) == []


def test_special_text_is_still_only_text_in_the_holdout(tmp_path):
    """A document that is nothing but special tokens leaves nothing to keep: said, as ever."""
    special = Kit(train_tokenizer(), write_corpus(tmp_path / "c", [SEPARATOR] * 500))
    with pytest.raises(UsageError, match=r"no row of the .* part would be kept"):
        special.build(small_settings(tmp_path / "s.zarr", packing="document", n_tokens=None))
