"""Packing against an oracle that moves one token at a time, and against the texts themselves."""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from actcache.errors import CorpusError, DiskFullError, ModelError, UsageError
from actcache.producer import tokens as subject
from actcache.producer.tokens import (
    PAD_DOCUMENT,
    TokenPlan,
    holdout_mask,
    keep_mask,
    pack,
    separator_id,
    sequence_order,
    special_ids,
    tokenizer_digest,
)
from actcache.store import keyed

ASSETS = Path(__file__).parents[1] / "assets"
EOS, BOS, VOCAB = 1, 2, 23


def make_tokenizer(**special):
    """One token a word: w3 is id 3, up to w22."""
    vocabulary = {"<unk>": 0, "<eos>": EOS, "<bos>": BOS} | {f"w{i}": i for i in range(3, VOCAB)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


WORDS = make_tokenizer(eos_token="<eos>", bos_token="<bos>")


@pytest.fixture(scope="module")
def tiny_tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny-neox")


@pytest.fixture(scope="module")
def texts():
    lines = (ASSETS / "text" / "sotu.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def make_plan(**changes):
    return TokenPlan(
        **{"seq_len": 8, "seed": 0, "holdout_frac": 0.3, "n_train": None, "n_holdout": None} | changes
    )


class TooShort(Exception):
    pass


def slow_pack(documents, plan):
    """The same, a token at a time, in lists. Returns per stream (tokens, document, n_tokens, n_documents, n_skipped), n_read, digest."""
    wanted = {"train": plan.n_train, "holdout": plan.n_holdout}
    sequences = {name: [] for name in wanted}
    used = {name: set() for name in wanted}
    n_skipped = dict.fromkeys(wanted, 0)
    digest = hashlib.sha256()
    n_read = 0

    def is_full(name):
        n_sequences = len(sequences[name])
        if n_sequences and len(sequences[name][-1]) < plan.seq_len:
            n_sequences -= 1
        return wanted[name] is not None and n_sequences == wanted[name]

    for i, ids in enumerate(documents):
        if is_full("train") and is_full("holdout"):
            break
        n_read += 1
        raw = as_text(ids).encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
        chance = int(keyed.hash_u64(keyed.derive(plan.seed, "holdout"), np.array([i]))[0]) / 2**64
        name = "holdout" if chance < plan.holdout_frac else "train"
        if is_full(name):
            n_skipped[name] += 1
            continue
        for token in [EOS, *ids]:
            if is_full(name):
                break
            if not sequences[name] or len(sequences[name][-1]) == plan.seq_len:
                sequences[name].append([(BOS, i)] if plan.bos else [])
            sequences[name][-1].append((token, i))
            used[name].add(i)
    if plan.n_train is not None and not (is_full("train") and is_full("holdout")):
        raise TooShort
    if plan.n_train is None and not used["train"]:
        raise TooShort
    streams = {}
    for name, rows in sequences.items():
        n_tokens = sum(map(len, rows))
        padded = [row + [(0, PAD_DOCUMENT)] * (plan.seq_len - len(row)) for row in rows]
        tokens, document = ([[pair[k] for pair in row] for row in padded] for k in (0, 1))
        streams[name] = (tokens, document, n_tokens, len(used[name]), n_skipped[name])
    return streams, n_read, digest.hexdigest()


def as_text(ids):
    return " ".join(f"w{i}" for i in ids)


DOCUMENTS = st.lists(st.lists(st.integers(3, VOCAB - 1), max_size=20), max_size=25)


@st.composite
def plans(draw):
    seq_len, bos = draw(st.integers(2, 12)), draw(st.booleans())
    wanted = draw(st.none() | st.tuples(st.integers(0, 8), st.integers(0, 3)).filter(any))
    holdout_frac = draw(st.sampled_from([0.1, 0.3, 0.9] if wanted and wanted[1] else [0.0, 0.1, 0.3, 0.9]))
    n_train, n_holdout = wanted or (None, None)
    return make_plan(
        seq_len=seq_len,
        seed=draw(st.integers(0, 5)),
        holdout_frac=holdout_frac,
        bos=bos,
        n_train=n_train,
        n_holdout=n_holdout,
    )


@settings(max_examples=150, deadline=None, database=None)
@given(documents=DOCUMENTS, plan=plans(), batch_characters=st.sampled_from([1, 40, 1 << 18]))
def test_packing_equals_the_oracle(documents, plan, batch_characters):
    progress = []
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as spool_dir:
        patch.setattr(subject, "_BATCH_CHARACTERS", batch_characters)

        def run():
            return pack(
                map(as_text, documents),
                WORDS,
                plan,
                spool_dir=Path(spool_dir),
                vocab_size=VOCAB,
                on_progress=progress.append,
            )

        try:
            streams, n_read, digest = slow_pack(documents, plan)
        except TooShort:
            with pytest.raises(CorpusError):
                run()
            return
        packed = run()
        for name, (tokens, document, n_tokens, n_documents, n_skipped) in streams.items():
            stream = getattr(packed, name)
            assert stream.tokens.dtype == stream.document.dtype == np.uint32
            assert stream.tokens.shape == stream.document.shape == (len(tokens), plan.seq_len)
            assert stream.tokens.tolist() == tokens
            assert stream.document.tolist() == document
            assert (stream.n_tokens, stream.n_documents, stream.n_skipped) == (
                n_tokens,
                n_documents,
                n_skipped,
            )
        assert (packed.n_documents_read, packed.text_digest) == (n_read, digest)
        assert (packed.separator_id, packed.bos_id) == (EOS, BOS if plan.bos else None)
        assert progress == sorted(progress)
        assert progress[-1] == packed.train.n_tokens + packed.holdout.n_tokens


@pytest.mark.parametrize("bos", [False, True])
def test_every_token_leads_back_to_its_text(tmp_path, tiny_tokenizer, texts, bos):
    plan = make_plan(seq_len=64, bos=bos)
    packed = pack(texts, tiny_tokenizer, plan, spool_dir=tmp_path, vocab_size=4096)
    train, holdout = (
        set(np.unique(stream.document)) - {PAD_DOCUMENT} for stream in (packed.train, packed.holdout)
    )
    assert not train & holdout
    assert train | holdout == set(range(len(texts)))
    assert 8 <= len(holdout) <= 25
    for stream in (packed.train, packed.holdout):
        tokens, document = (array[:, int(bos) :].ravel() for array in (stream.tokens, stream.document))
        for i in set(document.tolist()) - {PAD_DOCUMENT}:
            separator, *ids = tokens[document == i].tolist()
            assert separator == packed.separator_id == 0
            assert tiny_tokenizer.decode(ids) == texts[i]


def test_packing_is_deterministic_and_the_seed_moves_documents(tmp_path, tiny_tokenizer, texts):
    def documents_held_out(folder, seed):
        (tmp_path / folder).mkdir()
        plan = make_plan(seq_len=32, seed=seed)
        packed = pack(iter(texts), tiny_tokenizer, plan, spool_dir=tmp_path / folder, vocab_size=4096)
        files = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        return files, packed.text_digest, set(np.unique(packed.holdout.document))

    assert documents_held_out("a", 0) == documents_held_out("b", 0)
    assert documents_held_out("c", 1)[2] != documents_held_out("d", 0)[2]


def test_the_spool_is_all_that_is_written_and_an_interrupted_one_is_replaced(tmp_path, texts, tiny_tokenizer):
    def interrupted():
        yield from texts[:50]
        raise ConnectionError

    (tmp_path / "spool").mkdir()
    with pytest.raises(ConnectionError):
        pack(interrupted(), tiny_tokenizer, make_plan(), spool_dir=tmp_path / "spool", vocab_size=4096)
    packed = pack(
        texts[:3], tiny_tokenizer, make_plan(holdout_frac=0), spool_dir=tmp_path / "spool", vocab_size=4096
    )
    names = ["holdout.document.u32", "holdout.tokens.u32", "train.document.u32", "train.tokens.u32"]
    assert sorted(path.name for path in (tmp_path / "spool").iterdir()) == names
    assert [path.name for path in tmp_path.iterdir()] == ["spool"]
    assert (tmp_path / "spool" / names[3]).stat().st_size == 4 * packed.train.tokens.size
    assert packed.holdout.tokens.shape == (0, 8)
    assert not packed.train.tokens.flags.writeable


def test_reading_stops_when_both_streams_are_full(tmp_path, texts, tiny_tokenizer):
    n_taken = 0

    def endless():
        nonlocal n_taken
        while True:
            yield texts[n_taken % len(texts)]
            n_taken += 1

    plan = make_plan(seq_len=32, n_train=20, n_holdout=3)
    packed = pack(endless(), tiny_tokenizer, plan, spool_dir=tmp_path, vocab_size=4096)
    assert packed.n_documents_read <= 10
    assert n_taken < 60  # one batch
    assert (
        packed.train.n_documents
        + packed.holdout.n_documents
        + packed.train.n_skipped
        + packed.holdout.n_skipped
        == (packed.n_documents_read)
    )


def test_too_short_a_corpus_says_how_short(tmp_path):
    plan = make_plan(n_train=5, n_holdout=2, holdout_frac=0.5)
    n_train = 10 * int((~holdout_mask(np.arange(4), 0, 0.5)).sum())
    with pytest.raises(CorpusError) as caught:
        pack([as_text(range(3, 12))] * 4, WORDS, plan, spool_dir=tmp_path, vocab_size=VOCAB)
    assert (
        f"Its 4 documents, 0.5 of them held out, give train: {n_train} tokens, 40 wanted (5 sequences of 8)"
        in str(caught.value)
    )
    assert "16 wanted (2 sequences of 8). Add text, ask for fewer tokens" in str(caught.value)


def test_no_document_left_to_train_on(tmp_path):
    with pytest.raises(CorpusError, match="of 0 documents 0 are held out and none is left to train on"):
        pack([], WORDS, make_plan(), spool_dir=tmp_path, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 0}, "seq_len 0: expected at least 1"),
        ({"seq_len": 1, "bos": True}, "seq_len 1: expected at least 2"),
        ({"holdout_frac": 1.0}, "expected 0 <= holdout_frac < 1"),
        ({"holdout_frac": -0.1}, "expected 0 <= holdout_frac < 1"),
        ({"holdout_frac": float("nan")}, "expected 0 <= holdout_frac < 1"),
        ({"n_train": 3}, "give both, or neither for the whole corpus"),
        ({"n_train": 0, "n_holdout": 0}, "nothing to pack"),
        ({"n_train": -1, "n_holdout": 5}, "nothing to pack"),
        ({"n_train": 5, "n_holdout": 1, "holdout_frac": 0}, "1 holdout sequences of holdout_frac 0"),
    ],
)
def test_plans_that_cannot_be(changes, message):
    with pytest.raises(UsageError, match=message):
        make_plan(**changes)


def test_ids_must_fit_the_model(tmp_path):
    with pytest.raises(
        ModelError, match=r"gives id 22; the model knows 0 to 21\. Use the tokenizer that belongs"
    ):
        pack(["w3 w22"], WORDS, make_plan(holdout_frac=0), spool_dir=tmp_path, vocab_size=22)
    with pytest.raises(ModelError, match="gives id 2; the model knows 0 to 1"):
        pack([], WORDS, make_plan(bos=True), spool_dir=tmp_path, vocab_size=2)


def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "train.tokens.u32").symlink_to("/dev/full")
    with pytest.raises(
        DiskFullError, match=f"{tmp_path} cannot hold the packed tokens: full after 0 train sequences"
    ):
        pack(["w3 " * 20], WORDS, make_plan(holdout_frac=0), spool_dir=tmp_path, vocab_size=VOCAB)


def test_separator_is_eos_else_bos():
    assert separator_id(WORDS) == EOS
    assert separator_id(make_tokenizer(bos_token="<bos>")) == BOS
    with pytest.raises(UsageError, match="neither an EOS nor a BOS"):
        separator_id(make_tokenizer())
    assert special_ids(make_tokenizer(eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")) == (
        0,
        EOS,
        BOS,
    )


def test_bos_needs_one(tmp_path):
    with pytest.raises(UsageError, match="has no BOS token; use bos=False"):
        pack([], make_tokenizer(eos_token="<eos>"), make_plan(bos=True), spool_dir=tmp_path, vocab_size=VOCAB)


def test_keep_mask():
    tokens = np.array([[1, 5, 6, 1, 7], [8, 2, 9, 0, 0]], dtype=np.uint32)
    document = np.array([[0, 0, 0, 1, 1], [1, 2, 2, PAD_DOCUMENT, PAD_DOCUMENT]], dtype=np.uint32)
    keep = keep_mask(tokens, document, (1, 2), 0)
    assert keep.dtype == np.bool_
    assert keep.tolist() == [[False, True, True, False, True], [True, False, True, False, False]]
    assert keep_mask(tokens, document, (), 2).tolist() == [
        [False, False, True, True, True],
        [False, False, True, False, False],
    ]
    assert not keep_mask(tokens, document, (), 9).any()
    real_zero = np.zeros_like(document)
    assert keep_mask(real_zero, real_zero, (1,), 0).all()  # id 0 is padding only where the document says so


def test_sequence_order_is_a_permutation_of_its_stream_and_seed():
    orders = [tuple(sequence_order(1000, seed, stream)) for seed in (0, 1) for stream in ("train", "holdout")]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert sequence_order(0, 0, "train").shape == (0,)
    assert sequence_order(6, 7, "train").tolist() == sequence_order(6, 7, "train").tolist()


def test_orders_are_the_same_for_ever():
    assert sequence_order(8, 0, "train").tolist() == [3, 1, 4, 5, 7, 0, 2, 6]
    assert np.flatnonzero(holdout_mask(np.arange(60), 0, 0.1)).tolist() == [20, 25, 27, 43]


def test_holdout_is_its_fraction_of_documents():
    documents = np.arange(100_000)
    assert holdout_mask(documents, 3, 0.05).mean() == pytest.approx(0.05, abs=0.003)
    assert not holdout_mask(documents, 3, 0.0).any()
    assert (
        holdout_mask(documents, 3, 0.1) | ~holdout_mask(documents, 3, 0.05)
    ).all()  # a larger holdout holds the smaller


def test_tokenizer_digest(tiny_tokenizer):
    digest = tokenizer_digest(tiny_tokenizer)
    fresh = AutoTokenizer.from_pretrained(ASSETS / "tiny-neox")
    fresh.pad_token = fresh.eos_token
    fresh(["some text", "more"], padding=True, truncation=True, max_length=3)
    assert tokenizer_digest(fresh) == digest
    fresh.add_tokens(["brandnew"])
    assert tokenizer_digest(fresh) != digest
    assert tokenizer_digest(WORDS) != digest


def test_slow_tokenizers_are_refused(tmp_path):
    class Slow:
        is_fast = False
        name_or_path = "old"

    for use in (tokenizer_digest, lambda slow: pack([], slow, make_plan(), spool_dir=tmp_path, vocab_size=9)):
        with pytest.raises(ModelError, match=r"tokenizer 'old' \(Slow\) has no fast backend"):
            use(Slow())
