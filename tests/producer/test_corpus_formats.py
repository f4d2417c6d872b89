"""Parquet, conversations, and what is tokenised already: values, nulls, masks, damage, and memory."""

import json
import threading
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.errors import CorpusError, NotFoundError, UsageError
from actcache.producer.corpus import Fields, choose_fields, documents, ids, open_source, parquet
from tests.producer.test_packing import BOS, EOS, make_tokenizer

TEXTS = ["First.\nSecond line.", "Äöü 中文 🙂", "  spaced\t", "x" * 5000]


def read(path, **fields):
    source = open_source(path, Fields(**fields))
    return list(source.documents())


# Parquet.


def write_parquet(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_parquet_text(tmp_path, kind, compression):
    values = pa.array(TEXTS * 9, pa.string()).cast(kind)
    path = write_parquet(
        tmp_path / "a.parquet",
        {"id": list(range(36)), "text": values},
        row_group_size=7,
        compression=compression,
    )
    assert read(path) == TEXTS * 9


def test_parquet_nulls_and_blanks_are_empty_documents_and_counted(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"body": ["one", None, " ", "", "two"]})
    source = open_source(path, Fields(column="body"))
    assert list(source.documents()) == ["one", "two"]
    assert source.n_empty == 3


def test_parquet_of_several_files_and_empty_ones(tmp_path):
    for name, texts in (("b", ["2", "3"]), ("a", ["1"]), ("c", [])):
        write_parquet(tmp_path / f"{name}.parquet", {"text": pa.array(texts, pa.string())})
    assert read(tmp_path) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("columns", "fields", "message"),
    [
        ({"body": ["x"]}, {}, r"a\.parquet: no column 'text'; columns are 'body'"),
        ({"text": [1]}, {}, r"column 'text' holds int64; expected strings"),
        ({"text": [[1]]}, {}, r"column 'text' holds list<.*int64>; expected strings.*--ids-column"),
        ({"text": [b"x"]}, {}, r"column 'text' holds binary; expected strings"),
        ({"text": ["x"]}, {"kind": "ids"}, r"column 'text' holds string; expected lists of integers"),
        ({"text": [[1.5]]}, {"kind": "ids"}, r"holds list<.*double>; expected lists of integers"),
        ({"text": [["x"]]}, {"kind": "chat", "render": str}, "expected lists of messages"),
        ({"text": [[1, None]]}, {"kind": "ids"}, r"rows from 0: a list with a null in it"),
        ({"text": ["y" * 200]}, {}, r"a\.parquet, row 0: a document of 200 bytes; expected at most 100"),
        ({"text": [[1, -5]]}, {"kind": "ids"}, r"row 0: ids from -5 to 1"),
        (
            {"text": [[7]]},
            {"kind": "ids", "n_ids": 7},
            r"row 0: ids from 7 to 7; the model knows 0 to 6.*--token-dtype",
        ),
        ({"text": [[1] * 31]}, {"kind": "ids"}, r"row 0: a document of 31 ids; expected at most 30"),
        (
            {"text": [[1, 2]], "attention_mask": [[1]]},
            {"kind": "ids"},
            r"2 ids and 1 numbers in the mask beside them",
        ),
    ],
)
def test_parquet_that_is_not_what_was_said(tmp_path, monkeypatch, columns, fields, message):
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(documents, "MAX_DOCUMENT_TOKENS", 30)
    path = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(CorpusError, match=message):
        read(path, **fields)


def test_damaged_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": [str(i) * 50 for i in range(2000)]})
    raw = path.read_bytes()
    for damaged in (raw[:-20], raw[: len(raw) // 2], b"", raw[:4] + bytes(1000) + raw[1004:]):
        path.write_bytes(damaged)
        with pytest.raises(CorpusError, match=r"a\.parquet: not a whole parquet file \(.*\)\. Copy it again"):
            read(path)


def test_a_row_group_of_any_size_passes_through_little_memory(tmp_path):
    """64 MB of text in one row group, pages of 1 MB: neither Arrow nor Python holds more than a few at a time."""
    text = "".join(chr(97 + i % 26) for i in range(64_000))
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [f"{i} {text}" for i in range(1000)]}),
        path,
        row_group_size=1000,
        use_dictionary=False,
        compression="none",
        data_page_size=1 << 20,
        write_batch_size=8,
    )
    pool, before = pa.default_memory_pool(), pa.default_memory_pool().bytes_allocated()
    most = 0
    tracemalloc.start()
    try:
        for n, document in enumerate(open_source(path).documents()):
            assert document.startswith(f"{n} ")
            most = max(most, pool.bytes_allocated() - before)
        python_most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n == 999
    assert 0 < most < 16 << 20
    assert python_most < 16 << 20


# Conversations.


CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
TALKS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    [{"role": "user", "content": "Ümlaut?"}],
]
RENDERED = ["<|user|>Hi<|assistant|>Hello", "<|user|>Ümlaut?"]


def chat_fields(template=CHAT, **more):
    tokenizer = make_tokenizer(eos_token="<eos>", bos_token="<bos>")
    tokenizer.chat_template = template
    return choose_fields(tokenizer, 23, **{"chat_template": "tokenizer", **more})


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_conversations_are_rendered_by_the_template(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in [*TALKS, []]))
    else:
        write_parquet(path, {"messages": [*TALKS, None, []]})
    source = open_source(path, chat_fields())
    assert list(source.documents()) == RENDERED
    assert source.n_empty == (1 if suffix == "jsonl" else 2)
    assert source.fields.template == CHAT


def test_templates_by_name_and_from_a_file(tmp_path):
    named = {"default": "d{{ messages[0].content }}", "tools": "t{{ messages[0].content }}"}
    for chosen, expected in (("tokenizer", "dHi"), ("tools", "tHi")):
        fields = chat_fields(named, chat_template=chosen)
        assert fields.to_document(TALKS[0], "here") == expected
    (tmp_path / "mine.jinja").write_text("mine {{ messages | length }}")
    fields = chat_fields(None, chat_template=str(tmp_path / "mine.jinja"), text_column="turns")
    assert fields.to_document(TALKS[0], "here") == "mine 2"
    assert fields.column == "turns"
    with pytest.raises(
        UsageError, match=r"'nose': tokenizer .* has the templates default, tools; give 'tokenizer'"
    ):
        chat_fields(named, chat_template="nose")
    with pytest.raises(UsageError, match=r"'tokenizer': tokenizer .* has none"):
        chat_fields(None)
    with pytest.raises(NotFoundError, match=r"chat template gone\.jinja: no such file"):
        chat_fields(None, chat_template="gone.jinja")


@pytest.mark.parametrize(
    ("value", "template", "message"),
    [
        ("text", CHAT, r"here: column 'messages' holds str; expected a list of messages"),
        (
            [{"from": "human", "value": "Hi"}, 3],
            CHAT,
            r"holds list; expected a list of messages, each an object",
        ),
        (
            [{"from": "human"}],
            "{% if not messages[0].role %}{{ raise_exception('no role') }}{% endif %}",
            r"here: the chat template refuses these messages \(no role\); their fields are from",
        ),
        ([{"role": "user"}], "{{ messages[0].content + 1 }}", r"the chat template refuses these messages"),
    ],
)
def test_what_is_no_conversation(value, template, message):
    with pytest.raises(CorpusError, match=message):
        chat_fields(template).to_document(value, "here")


# Token ids.


IDS = [[5, 6, 7], [8], [9, 10, 11, 12]]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_column_of_ids(tmp_path, suffix, masked):
    """A mask beside them, as padded data sets have one, is obeyed."""
    path = tmp_path / f"a.{suffix}"
    padded = [row + [0] * (5 - len(row)) for row in IDS] if masked else IDS
    masks = [[1] * len(row) + [0] * (5 - len(row)) for row in IDS]
    if suffix == "jsonl":
        rows = [
            {"input_ids": i, **({"attention_mask": m} if masked else {})}
            for i, m in zip(padded, masks, strict=True)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"input_ids": []}]))
    else:
        write_parquet(
            path,
            {
                "input_ids": pa.array([*padded, []], pa.list_(pa.int32())),
                **({"attention_mask": [*masks, []]} if masked else {}),
            },
        )
    source = open_source(path, Fields(kind="ids", column="input_ids"))
    found = list(source.documents())
    assert [d.tolist() for d in found] == IDS
    assert {d.dtype for d in found} == {np.dtype(np.uint32)}
    assert source.n_empty == 1


@pytest.mark.parametrize("bad", ['"x"', "[1.5]", "[true]", '["a"]', "{}"])
def test_json_that_is_no_ids(tmp_path, bad):
    (tmp_path / "a.jsonl").write_text(f'{{"input_ids": {bad}}}\n')
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 1: column 'input_ids' holds no list of integers"):
        read(tmp_path, kind="ids", column="input_ids")


@given(
    stream=st.lists(st.sampled_from([EOS, 5, 6]), min_size=1, max_size=60),
    block=st.integers(1, 9),
    token_dtype=st.sampled_from(ids.TOKEN_DTYPES),
    as_npy=st.booleans(),
)
@settings(max_examples=150)
def test_flat_files_are_cut_after_every_eos(tmp_path_factory, stream, block, token_dtype, as_npy):
    expected, rest = [], []
    for i in stream:
        rest.append(i)
        if i == EOS:
            expected.append(rest)
            rest = []
    expected += [rest] if rest else []
    folder = tmp_path_factory.mktemp("flat")
    array = np.array(stream, token_dtype)
    if as_npy:
        np.save(folder / "a.npy", array)
    else:
        array.tofile(folder / "a.bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ids, "_BLOCK_IDS", block)
        assert [d.tolist() for d in read(folder, token_dtype=token_dtype, end_id=EOS)] == expected


@given(
    n=st.integers(1, 6),
    length=st.integers(1, 7),
    block=st.integers(1, 9),
    how=st.sampled_from(["flat", "2d", "bin"]),
)
def test_files_of_documents_of_one_length(tmp_path_factory, n, length, block, how):
    array = np.arange(n * length, dtype=np.uint16).reshape(n, length)
    folder = tmp_path_factory.mktemp("rows")
    if how == "bin":
        array.tofile(folder / "a.bin")
    else:
        np.save(folder / "a.npy", array if how == "2d" else array.reshape(-1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ids, "_BLOCK_IDS", block)
        found = read(folder, document_tokens=None if how == "2d" else length, end_id=0)
    assert [d.tolist() for d in found] == array.tolist()


def save(folder, value, **_):
    np.save(folder / "a.npy", value)


@pytest.mark.parametrize(
    ("write", "fields", "message"),
    [
        (lambda f: (f / "a.bin").write_bytes(b"123"), {}, r"a\.bin: 3 bytes, no multiple of the 2 of uint16"),
        (
            lambda f: (f / "a.bin").write_bytes(b"12345678"),
            {"document_tokens": 3},
            "4 ids are no whole number of documents of 3",
        ),
        (
            lambda f: (f / "a.bin").write_bytes(bytes(8)),
            {},
            "nothing says where a document ends.*Give --document-tokens",
        ),
        (
            lambda f: (f / "a.bin").write_bytes(bytes(100)),
            {"end_id": 1},
            "more than 30 ids without the one that ends a document, 1",
        ),
        (
            lambda f: (f / "a.bin").write_bytes(b"\xff" * 8),
            {"end_id": 1, "n_ids": 9},
            r"document 0: ids from 65535 to 65535",
        ),
        (
            lambda f: (f / "a.npy").write_bytes(bytes(64)),
            {"end_id": 1},
            r"a\.npy: no array of numpy's.*read from a \.bin",
        ),
        (lambda f: save(f, np.zeros(4)), {"end_id": 1}, r"<f8 \[4\]; expected little-endian integers"),
        (lambda f: save(f, np.zeros(4, ">u2")), {"end_id": 1}, r">u2 \[4\]; expected little-endian integers"),
        (lambda f: save(f, np.zeros((2, 2, 2), np.int64)), {"end_id": 1}, r"<i8 \[2, 2, 2\]; expected"),
        (lambda f: save(f, np.asfortranarray(np.zeros((2, 3), np.int64))), {}, "in Fortran order"),
        (lambda f: save(f, np.array([None])), {}, r"\|O \[1\]; expected"),
    ],
)
def test_files_of_ids_that_are_not_what_was_said(tmp_path, monkeypatch, write, fields, message):
    monkeypatch.setattr(documents, "MAX_DOCUMENT_TOKENS", 30)
    monkeypatch.setattr(ids, "MAX_DOCUMENT_TOKENS", 30)
    write(tmp_path)
    with pytest.raises(CorpusError, match=message):
        read(tmp_path, **fields)


def test_an_npy_that_is_cut_short_or_too_long(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(100))
    raw = (tmp_path / "a.npy").read_bytes()
    for damaged in (raw[:-1], raw[:200], raw + b"x"):
        (tmp_path / "a.npy").write_bytes(damaged)
        with pytest.raises(CorpusError, match=r"a\.npy: \d+ bytes where its one array ends at 928"):
            read(tmp_path, document_tokens=10)


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(ids, "_BLOCK_IDS", 4)
    path = tmp_path / "a.bin"
    (np.arange(40_000) % 60_000).astype(np.uint16).tofile(path)
    found = open_source(path, Fields(document_tokens=4)).documents()
    next(found)
    with path.open("r+b") as file:
        file.truncate(20_000)
    with pytest.raises(CorpusError, match=r"a\.bin: it ends 30000 ids early"):
        for _ in found:
            pass


def test_ids_are_told_from_text_by_their_files(tmp_path):
    np.arange(6, dtype=np.uint16).tofile(tmp_path / "a.bin")
    source = open_source(tmp_path, Fields(document_tokens=3))
    assert source.fields.kind == "ids"
    assert [d.tolist() for d in source.documents()] == [[0, 1, 2], [3, 4, 5]]
    (tmp_path / "b.txt").write_text("text")
    source = open_source(tmp_path, Fields(document_tokens=3))
    assert (source.fields.kind, source.ignored) == ("text", ("a.bin",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids_column": "i", "text_column": "t"}, "leave out --text-column and --chat-template"),
        ({"ids_column": "i", "chat_template": "tokenizer"}, "leave out --text-column and --chat-template"),
        ({"token_dtype": "float16"}, "--token-dtype float16: expected one of uint16, uint32, int32, int64"),
        ({"document_tokens": 0}, "--document-tokens 0: expected at least 1"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(UsageError, match=message):
        choose_fields(make_tokenizer(eos_token="<eos>"), 23, **options)


def test_fields_that_are_chosen():
    tokenizer = make_tokenizer(eos_token="<eos>", bos_token="<bos>")
    assert choose_fields(tokenizer, 23) == Fields(n_ids=23, end_id=EOS)
    chosen = choose_fields(tokenizer, 23, ids_column="input_ids", token_dtype="int32", document_tokens=4)
    assert (chosen.kind, chosen.column, chosen.token_dtype, chosen.document_tokens) == (
        "ids",
        "input_ids",
        "int32",
        4,
    )
    assert choose_fields(make_tokenizer(bos_token="<bos>"), 23).end_id is None
    assert BOS != EOS


def test_reading_leaves_nothing_behind(tmp_path):
    """A reader that is left in the middle closes its file, and starts no thread."""
    path = write_parquet(tmp_path / "a.parquet", {"text": TEXTS * 100})
    before = threading.active_count()
    found = open_source(path).documents()
    next(found)
    found.close()
    assert threading.active_count() == before
    assert parquet.PARQUET_SUFFIX == ".parquet"
