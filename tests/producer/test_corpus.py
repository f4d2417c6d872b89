"""Text here: every format, every way for it to be unreadable, and what the error says. Other places are test_corpus_urls's."""

import gzip
import json
import shutil

import pytest
import zstandard

from actcache.errors import CorpusError, NotFoundError, UsageError
from actcache.producer.corpus import CorpusFile, Fields, documents, lines, open_corpus, open_source

TEXTS = ["First.\nSecond line.", "Äöü 中文 🙂", "  spaced\t"]


def as_jsonl(texts, column="text"):
    return "".join(
        json.dumps({"id": i, column: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)
    ).encode()


def read(path, **fields):
    return list(open_source(path, Fields(**fields)).documents())


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".jsonl", bytes),
        (".jsonl.gz", gzip.compress),
        (".jsonl.zst", zstandard.compress),
        (".json", bytes),
        (".json.gz", gzip.compress),
        (".json.zst", zstandard.compress),
        (".jsonl", lambda raw: raw.rstrip(b"\n")),
        (".jsonl", lambda raw: b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n\n")),
        (".JSONL", bytes),
        (".jsonl.gz", lambda raw: gzip.compress(raw[:30]) + gzip.compress(raw[30:])),
        (".jsonl.zst", lambda raw: zstandard.compress(raw[:30]) + zstandard.compress(raw[30:])),
    ],
)
def test_json_lines(tmp_path, suffix, pack):
    path = tmp_path / f"some{suffix}"
    path.write_bytes(pack(as_jsonl(TEXTS)))
    assert read(path) == TEXTS


def test_lines_across_read_buffers(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_PLAIN_READ_BYTES", 3)
    monkeypatch.setattr(lines, "_ZSTD_READ_BYTES", 3)
    for name, raw in (("a.jsonl", as_jsonl(TEXTS)), ("b.jsonl.zst", zstandard.compress(as_jsonl(TEXTS)))):
        (tmp_path / name).write_bytes(raw)
        assert read(tmp_path / name) == TEXTS


def test_another_column(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(TEXTS, "body"))
    assert read(tmp_path / "a.jsonl", column="body") == TEXTS


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "two.txt").write_text("two\nlines\n")
    (tmp_path / "b" / "one.jsonl").write_bytes(as_jsonl(["one", "", " \n", None]))
    (tmp_path / "a.txt").write_text("zero")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "README.md").write_text("no document")
    return tmp_path


def test_folder_is_read_in_order_of_names_and_counts_what_it_skips(folder):
    corpus = open_source(folder)
    assert list(corpus.documents()) == ["zero", "two\nlines\n", "one"]
    assert corpus.n_empty == 4
    assert corpus.ignored == ("README.md",)
    assert list(corpus.documents()) == [
        "zero",
        "two\nlines\n",
        "one",
    ]  # a second pass is the same, counts included
    assert corpus.n_empty == 4


def test_files_hold_no_absolute_path(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(folder, elsewhere)
    assert open_source(folder).files == open_source(str(elsewhere)).files
    assert open_source(folder).files[0] == CorpusFile("a.txt", 4)
    assert [file.name for file in open_source(folder / "b" / "one.jsonl").files] == ["one.jsonl"]


def test_globs(folder):
    assert [file.name for file in open_source(folder / "*.txt").files] == ["a.txt", "empty.txt"]
    assert [file.name for file in open_source(f"{folder}/b/**/*").files] == ["deep/two.txt", "one.jsonl"]
    assert open_source(f"{folder}/*").ignored == ("README.md",)
    (folder / "[1].txt").write_text("a name that looks like a glob")
    assert read(folder / "[1].txt") == ["a name that looks like a glob"]


@pytest.mark.parametrize("name", ["gone", "gone.txt", "gone/a.jsonl"])
def test_nothing_there(tmp_path, name):
    with pytest.raises(NotFoundError, match=f"corpus .*{name}: no such file or folder"):
        open_source(tmp_path / name)


def test_nothing_of_a_known_suffix(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    expected = r"no file ends in \.txt, \.jsonl, .*\.json\.zst, \.parquet; 1 other files, such as a\.pdf"
    for path in (tmp_path, tmp_path / "a.pdf", tmp_path / "*"):
        with pytest.raises(CorpusError, match=expected):
            open_source(path)
    with pytest.raises(CorpusError, match="no file ends in"):
        open_source(tmp_path / "*.txt")


def test_no_document_with_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(["", "\n"]))
    (tmp_path / "b.txt").write_text(" ")
    with pytest.raises(CorpusError, match="2 files, 3 documents, none of them with text"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', r"a\.jsonl, line 3: not JSON \(.*\); expected one object a line"),
        (b"[" * 100_000, r"line 3: not JSON"),
        (b'["x"]', r"line 3: a JSON list; expected an object with a column 'text'"),
        (b'{"id": 1, "body": "x"}', r"line 3: no column 'text'; columns are 'id', 'body'"),
        (b"{}", r"line 3: no column 'text'; columns are \(none\)"),
        (
            b'{"text": ["x"]}',
            r"line 3: column 'text' holds list; expected a string.*--ids-column.*--chat-template",
        ),
        (b'{"text": "\xff"}', r"line 3: byte 0xff at offset 10 is not UTF-8"),
        (
            b'{"text": "ab\\ud800"}',
            r"line 3: column 'text' holds half a surrogate pair, \\ud800, at character 2",
        ),
    ],
)
def test_bad_lines_say_file_line_and_what_was_expected(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "after"}\n')
    documents = open_source(tmp_path / "a.jsonl").documents()
    assert next(documents) == "fine"
    with pytest.raises(CorpusError, match=message):
        next(documents)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"a\.txt: byte 0xfc at offset 2 is not UTF-8 .*iconv"):
        read(tmp_path)


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_damaged_compressed_files(tmp_path, suffix, compress):
    path = tmp_path / f"a.jsonl.{suffix}"
    raw = compress(as_jsonl([str(i) * 50 for i in range(500)]))
    for n_bytes in (len(raw) - 1, len(raw) // 2, 12, 0):
        path.write_bytes(raw[:n_bytes])
        with pytest.raises(
            CorpusError, match=rf"a\.jsonl\.{suffix}: the compressed data end early: a truncated file"
        ):
            read(path)
    for damaged in (b"{}" + raw, raw + b"not a frame"):
        path.write_bytes(damaged)
        with pytest.raises(
            CorpusError, match=rf"a\.jsonl\.{suffix}: not the \.{suffix} its name says, or damaged"
        ):
            read(path)


def test_documents_are_bounded(tmp_path, monkeypatch):
    for module in (lines, documents):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(lines, "_PLAIN_READ_BYTES", 64)
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(["x", "y" * 200]))
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 2: more than 100 bytes without an end of line"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_text("y" * 101)
    with pytest.raises(CorpusError, match=r"b\.txt: 101 bytes; a \.txt file is one document, of at most 100"):
        read(tmp_path / "b.txt")


def test_a_file_gone_since(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_bytes(as_jsonl(["y"]))
    documents = open_source(tmp_path).documents()
    next(documents)
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(NotFoundError, match=r"b\.jsonl: gone from"):
        next(documents)


# Several sources.


def test_weights_are_shares(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(as_jsonl([name]))
    corpus = open_corpus([f"{tmp_path}/a.jsonl:3", f"{tmp_path}/b.jsonl:1"])
    assert corpus.weights == (0.75, 0.25)
    assert [source.name for source in corpus.sources] == ["a.jsonl", "b.jsonl"]
    assert [list(source.documents()) for source in corpus.sources] == [["a.jsonl"], ["b.jsonl"]]
    assert open_corpus([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]).weights is None
    assert open_corpus(f"{tmp_path}/a.jsonl:0.3").weights is None
    (tmp_path / "c.jsonl:2").write_bytes(b"a file that is called so")
    with pytest.raises(CorpusError, match=r"no file ends in"):
        open_corpus(f"{tmp_path}/c.jsonl:2")


@pytest.mark.parametrize(
    ("locations", "message"),
    [
        (["a.jsonl:0.5", "a.jsonl"], "1 of 2 corpora have a weight; give each one"),
        (["a.jsonl:0", "a.jsonl:1"], "weight 0: expected a number above 0"),
        (["a.jsonl:-1"], "weight -1: expected"),
        (["a.jsonl:nan"], "weight nan: expected"),
        (["a.jsonl:inf"], "weight inf: expected"),
        (["a.jsonl:half"], "'half' is no weight; expected a number above 0, as in"),
    ],
)
def test_weights_that_are_none(tmp_path, monkeypatch, locations, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(["x"]))
    with pytest.raises(UsageError, match=message):
        open_corpus(locations)
