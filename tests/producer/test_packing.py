"""Packing against an oracle that moves one token at a time, and against the texts themselves."""

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from actcache.errors import CorpusError, DiskFullError, ModelError, UsageError
from actcache.producer import mixture, packing, spool
from actcache.producer.mixture import TokenSource
from actcache.producer.packing import TokenPlan, pack
from actcache.producer.tokens import (
    PAD_DOCUMENT,
    holdout_mask,
    keep_mask,
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


def pack_texts(texts, tokenizer, plan, **more):
    """One source of texts, each after the tokenizer's separator."""
    source = TokenSource(name="texts", documents=texts, separator=separator_id(tokenizer))
    return pack([source], tokenizer, plan, **more)


class TooShort(Exception):
    pass


@dataclass(frozen=True)
class Given:
    """One source of the oracle: documents as lists of ids; `is_text` says how `pack` gets them."""

    documents: list[list[int]]
    weight: float | None
    separator: int | None
    is_text: bool

    def as_source(self, name):
        made = (
            map(as_text, self.documents) if self.is_text else (np.array(d, np.uint32) for d in self.documents)
        )
        return TokenSource(name=name, documents=made, weight=self.weight, separator=self.separator)


def slow_pack(given, plan):  # noqa: C901 - an oracle is read from top to bottom
    """The same, a token at a time, in lists.

    Returns per part (tokens, document, n_tokens, n_documents, n_skipped, n_cut, by_source), then documents read by source,
    the digest, and whether it is short.
    """
    wanted = {"train": plan.n_train, "holdout": plan.n_holdout}
    sequences = {name: [] for name in wanted}
    used = {name: set() for name in wanted}
    n_skipped, n_cut = dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 0)
    n_read, n_packed, ended = [0] * len(given), [0] * len(given), set()
    digest = hashlib.sha256()

    def is_full(name):
        n_sequences = len(sequences[name])
        if n_sequences and len(sequences[name][-1]) < plan.seq_len:
            n_sequences -= 1
        return wanted[name] is not None and n_sequences == wanted[name]

    def is_done():
        if plan.n_tokens is not None:
            return sum(len(row) for rows in sequences.values() for row in rows) >= plan.n_tokens
        return is_full("train") and is_full("holdout")

    def choose():
        left = [i for i in range(len(given)) if i not in ended]
        if given[0].weight is None:
            return left[0]
        return max(left, key=lambda i: (given[i].weight * sum(n_packed) - n_packed[i], -i))

    while not is_done() and len(ended) < len(given):
        c = choose()
        if n_read[c] == len(given[c].documents):
            if given[c].weight is not None and not plan.allow_short and len(given) > 1:
                raise TooShort
            ended.add(c)
            continue
        ids, number = given[c].documents[n_read[c]], n_read[c] * len(given) + c
        n_read[c] += 1
        raw = as_text(ids).encode() if given[c].is_text else np.array(ids, "<u4").tobytes()
        digest.update(len(raw).to_bytes(8, "little") + raw)
        chance = int(keyed.hash_u64(keyed.derive(plan.seed, "holdout"), np.array([number]))[0]) / 2**64
        name = "holdout" if chance < plan.holdout_frac else "train"
        if is_full(name):
            n_skipped[name] += 1
            continue
        content = ids if given[c].separator is None else [given[c].separator, *ids]
        used[name].add(number)
        if not plan.is_packed:
            room = plan.seq_len - plan.bos
            n_cut[name] += max(0, len(content) - room)
            row = [(BOS, number)] if plan.bos else []
            sequences[name].append(row + [(token, number) for token in content[:room]])
            n_packed[c] += min(room, len(content))
            continue
        n_packed[c] += len(content)
        for token in content:
            if is_full(name):
                break
            if not sequences[name] or len(sequences[name][-1]) == plan.seq_len:
                sequences[name].append([(BOS, number)] if plan.bos else [])
            sequences[name][-1].append((token, number))
    is_short = not is_done() and (plan.n_train is not None or plan.n_tokens is not None)
    if (is_short and not plan.allow_short) or (plan.n_train != 0 and not used["train"]):
        raise TooShort
    parts = {}
    for name, rows in sequences.items():
        padded = [row + [(0, PAD_DOCUMENT)] * (plan.seq_len - len(row)) for row in rows]
        tokens, document = ([[pair[k] for pair in row] for row in padded] for k in (0, 1))
        by_source = [sum(d % len(given) == c for row in rows for _t, d in row) for c in range(len(given))]
        counts = (sum(map(len, rows)), len(used[name]), n_skipped[name], n_cut[name])
        parts[name] = (tokens, document, *counts, by_source)
    return parts, tuple(n_read), digest.hexdigest(), is_short


def as_text(ids):
    return " ".join(f"w{i}" for i in ids)


DOCUMENT = st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=20)


@st.composite
def corpora(draw):
    n = draw(st.integers(1, 3))
    weights = [None] * n
    if draw(st.booleans()):
        parts = draw(st.lists(st.sampled_from([1, 2, 7]), min_size=n, max_size=n))
        weights = [part / sum(parts) for part in parts]
    return [
        Given(
            draw(st.lists(DOCUMENT, min_size=1, max_size=20)),
            weights[i],
            draw(st.sampled_from([None, EOS, BOS])),
            draw(st.booleans()),
        )
        for i in range(n)
    ]


@st.composite
def plans(draw):
    seq_len, bos = draw(st.integers(2, 12)), draw(st.booleans())
    is_packed, wanted, n_tokens = draw(st.booleans()), None, None
    if is_packed:
        wanted = draw(st.none() | st.tuples(st.integers(0, 8), st.integers(0, 3)).filter(any))
    else:
        n_tokens = draw(st.none() | st.integers(1, 60))
    holdout_frac = draw(st.sampled_from([0.1, 0.3, 0.9] if wanted and wanted[1] else [0.0, 0.1, 0.3, 0.9]))
    n_train, n_holdout = wanted or (None, None)
    return make_plan(
        seq_len=seq_len,
        seed=draw(st.integers(0, 5)),
        holdout_frac=holdout_frac,
        bos=bos,
        n_train=n_train,
        n_holdout=n_holdout,
        n_tokens=n_tokens,
        is_packed=is_packed,
        allow_short=draw(st.booleans()),
    )


@settings(max_examples=300, deadline=None, database=None)
@given(
    given_=corpora(),
    plan=plans(),
    batch_characters=st.sampled_from([1, 40, 1 << 18]),
    pending=st.sampled_from([1, 1 << 18]),
)
def test_packing_equals_the_oracle(given_, plan, batch_characters, pending):
    progress = []
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as spool_dir:
        patch.setattr(mixture, "_BATCH_CHARACTERS", batch_characters)
        patch.setattr(spool, "PENDING_IDS", pending)
        patch.setattr(packing, "_PROGRESS_TOKENS", 5)

        def run(folder):
            return pack(
                [source.as_source(str(i)) for i, source in enumerate(given_)],
                WORDS,
                plan,
                spool_dir=folder,
                vocab_size=VOCAB,
                on_progress=progress.append,
            )

        try:
            parts, n_read, digest, is_short = slow_pack(given_, plan)
        except TooShort:
            with pytest.raises(CorpusError):
                run(Path(spool_dir))
            return
        counted = run(None)
        progress.clear()
        packed = run(Path(spool_dir))
        for name, (tokens, document, n_tokens, n_documents, n_skipped, n_cut, by_source) in parts.items():
            stream = getattr(packed, name)
            assert stream.tokens.dtype == stream.document.dtype == np.uint32
            assert stream.tokens.shape == stream.document.shape == (len(tokens), plan.seq_len)
            assert stream.tokens.tolist() == tokens
            assert stream.document.tolist() == document
            for found in (stream, getattr(counted, name)):  # counting is the same, without a file
                assert (found.n_sequences, found.n_tokens, found.n_documents) == (
                    len(tokens),
                    n_tokens,
                    n_documents,
                )
                assert (found.n_skipped, found.n_cut, found.by_source.tolist()) == (
                    n_skipped,
                    n_cut,
                    by_source,
                )
            assert getattr(counted, name).tokens.size == 0
        for found in (packed, counted):
            assert (found.n_documents_read, found.text_digest, found.is_short) == (n_read, digest, is_short)
        assert progress == sorted(progress)
        assert progress[-1] == packed.train.n_tokens + packed.holdout.n_tokens


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.5, 0.25, 0.25), (0.99, 0.01)])
def test_shares_are_kept_to_within_a_document(tmp_path, weights):
    """Documents of very different lengths: the shares are of tokens, not of documents."""
    rng = np.random.default_rng(0)

    def documents(most):
        while True:
            yield as_text(rng.integers(3, VOCAB, rng.integers(1, most + 1)))

    longest = [4, 60, 15][: len(weights)]
    sources = [
        TokenSource(name=str(i), documents=documents(most), weight=weight, separator=EOS)
        for i, (most, weight) in enumerate(zip(longest, weights, strict=True))
    ]
    plan = make_plan(seq_len=16, n_train=400, n_holdout=20, holdout_frac=0.05)
    packed = pack(sources, WORDS, plan, spool_dir=tmp_path, vocab_size=VOCAB)
    by_source = packed.train.by_source + packed.holdout.by_source
    n_tokens = packed.train.n_tokens + packed.holdout.n_tokens
    assert by_source.sum() == n_tokens == 420 * 16
    slack = 2 * (max(longest) + 1)  # a document ahead, and one that the end cuts off in each part
    assert np.abs(by_source - np.array(weights) * n_tokens).max() <= 2 * slack
    numbers = {int(d) for d in np.unique(packed.train.document)} | {
        int(d) for d in np.unique(packed.holdout.document)
    }
    for number in numbers:
        c = number % len(weights)
        assert number // len(weights) < packed.n_documents_read[c]
    held_out = holdout_mask(np.array(sorted(numbers)), 0, 0.05)
    assert set(np.array(sorted(numbers))[held_out]) == {int(d) for d in np.unique(packed.holdout.document)}


def test_a_source_that_runs_out_is_an_error_or_said(tmp_path):
    def sources():
        return [
            TokenSource(name="long", documents=[as_text([3] * 9)] * 500, weight=0.5, separator=EOS),
            TokenSource(name="short", documents=[as_text([4] * 9)] * 20, weight=0.5, separator=EOS),
        ]

    plan = make_plan(n_train=100, n_holdout=0, holdout_frac=0)
    with pytest.raises(
        CorpusError,
        match=r"corpus short has run out after 20 documents, before its share of 0\.5.*long: 210 tokens; short: 200 tokens.*"
        r"--allow-short to go on without it",
    ):
        pack(sources(), WORDS, plan, spool_dir=tmp_path, vocab_size=VOCAB)
    plan = make_plan(n_train=100, n_holdout=0, holdout_frac=0, allow_short=True)
    packed = pack(sources(), WORDS, plan, spool_dir=tmp_path, vocab_size=VOCAB)
    assert packed.train.by_source.tolist() == [600, 200]
    assert not packed.is_short


@pytest.mark.parametrize("bos", [False, True])
def test_every_token_leads_back_to_its_text(tmp_path, tiny_tokenizer, texts, bos):
    plan = make_plan(seq_len=64, bos=bos)
    packed = pack_texts(texts, tiny_tokenizer, plan, spool_dir=tmp_path, vocab_size=4096)
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
            assert separator == 0
            assert tiny_tokenizer.decode(ids) == texts[i]


def test_packing_is_deterministic_and_the_seed_moves_documents(tmp_path, tiny_tokenizer, texts):
    def documents_held_out(folder, seed):
        (tmp_path / folder).mkdir()
        plan = make_plan(seq_len=32, seed=seed)
        packed = pack_texts(iter(texts), tiny_tokenizer, plan, spool_dir=tmp_path / folder, vocab_size=4096)
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
        pack_texts(interrupted(), tiny_tokenizer, make_plan(), spool_dir=tmp_path / "spool", vocab_size=4096)
    packed = pack_texts(
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
    packed = pack_texts(endless(), tiny_tokenizer, plan, spool_dir=tmp_path, vocab_size=4096)
    assert sum(packed.n_documents_read) <= 10
    assert n_taken < 60  # one batch
    assert (
        packed.train.n_documents
        + packed.holdout.n_documents
        + packed.train.n_skipped
        + packed.holdout.n_skipped
        == sum(packed.n_documents_read)
    )


def test_too_short_a_corpus_says_how_short(tmp_path):
    plan = make_plan(n_train=5, n_holdout=2, holdout_frac=0.5)
    n_train = 10 * int((~holdout_mask(np.arange(4), 0, 0.5)).sum())
    with pytest.raises(CorpusError) as caught:
        pack_texts([as_text(range(3, 12))] * 4, WORDS, plan, spool_dir=tmp_path, vocab_size=VOCAB)
    assert (
        f"Its 4 documents, 0.5 of them held out, give train: {n_train} tokens, 40 wanted (5 sequences of 8)"
        in str(caught.value)
    )
    assert "16 wanted (2 sequences of 8). Add text, ask for fewer tokens" in str(caught.value)


def test_no_document_left_to_train_on(tmp_path):
    with pytest.raises(CorpusError, match="of 0 documents 0 are held out and none is left to train on"):
        pack_texts([], WORDS, make_plan(), spool_dir=tmp_path, vocab_size=VOCAB)


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
        pack_texts(["w3 w22"], WORDS, make_plan(holdout_frac=0), spool_dir=tmp_path, vocab_size=22)
    with pytest.raises(ModelError, match="gives id 2; the model knows 0 to 1"):
        pack_texts([], WORDS, make_plan(bos=True), spool_dir=tmp_path, vocab_size=2)


def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "train.tokens.u32").symlink_to("/dev/full")
    with pytest.raises(
        DiskFullError, match=f"{tmp_path} cannot hold the packed tokens: full after 0 train sequences"
    ):
        pack_texts(["w3 " * 20], WORDS, make_plan(holdout_frac=0), spool_dir=tmp_path, vocab_size=VOCAB)


def test_separator_is_eos_else_bos():
    assert separator_id(WORDS) == EOS
    assert separator_id(make_tokenizer(bos_token="<bos>")) == BOS
    assert separator_id(WORDS, "bos") == BOS
    assert separator_id(WORDS, "none") is None
    for lacking, chosen, what in (
        (make_tokenizer(), "auto", "neither an EOS nor a BOS token"),
        (make_tokenizer(bos_token="<bos>"), "eos", "no EOS token"),
        (make_tokenizer(eos_token="<eos>"), "bos", "no BOS token"),
    ):
        with pytest.raises(UsageError, match=f"has {what} to separate documents; choose another --separator"):
            separator_id(lacking, chosen)
    assert special_ids(make_tokenizer(eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")) == (
        0,
        EOS,
        BOS,
    )


def test_bos_needs_one(tmp_path):
    with pytest.raises(UsageError, match="has no BOS token; leave out --bos"):
        pack_texts(
            [], make_tokenizer(eos_token="<eos>"), make_plan(bos=True), spool_dir=tmp_path, vocab_size=VOCAB
        )


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


def test_keep_mask_of_isolated_documents():
    """The first positions of every document are excluded, not only those of the sequence."""
    document = np.array([[3, 3, 3, 5, 5, 7, PAD_DOCUMENT]], dtype=np.uint32)
    tokens = np.full_like(document, 9)
    for n, expected in (
        (0, [True, True, True, True, True, True, False]),
        (1, [False, True, True, False, True, False, False]),
        (2, [False, False, True, False, False, False, False]),
    ):
        assert keep_mask(tokens, document, (), n, is_isolated=True).tolist() == [expected]


def test_special_ids_are_all_that_are_marked_special():
    """Chat models have markers that play no role the tokenizer knows: <|im_start|> and the like."""
    tokenizer = make_tokenizer(eos_token="<eos>", bos_token="<bos>")
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True), AddedToken("<plain>", special=False)])
    marker, plain = tokenizer.convert_tokens_to_ids(["<|turn|>", "<plain>"])
    assert marker not in tokenizer.all_special_ids
    assert special_ids(tokenizer) == (EOS, BOS, marker)
    assert plain not in special_ids(tokenizer)


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

    for use in (
        tokenizer_digest,
        lambda slow: pack([], slow, make_plan(), spool_dir=tmp_path, vocab_size=9),
    ):
        with pytest.raises(ModelError, match=r"tokenizer 'old' \(Slow\) has no fast backend"):
            use(Slow())
