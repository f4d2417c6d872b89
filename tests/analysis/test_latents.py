"""A store of latents: what is in it, going on after a stop, and what is wrong with a damaged one."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import actcache
from actcache.errors import DamageError, NotFoundError, PlanMismatchError, UsageError
from analysis import latents as module
from analysis.latents import FORMAT, HEADER, LatentStore, encode_store
from analysis.subject import load_subject
from tests.analysis.conftest import train
from tests.conftest import no_sync
from tests.docs.pages import DOCS, sections, tables, unquoted


@pytest.fixture
def written(subject, tmp_path):
    return encode_store(subject, tmp_path / "latents", split="train")


def test_holds_what_the_sae_makes_of_every_kept_row(subject, written):
    store, n_rows = subject.store, 0
    for codes, shard in zip(written, subject.shards("train"), strict=True):
        assert np.array_equal(codes.sequence, shard.sequence)
        assert np.array_equal(codes.position, shard.position)
        assert np.array_equal(codes.passes, shard.passes.T)
        assert (store.keep[codes.sequence, codes.position]).all()
        assert np.array_equal(codes.token, store.tokens[codes.sequence, codes.position])
        assert np.array_equal(codes.document, store.document[codes.sequence, codes.position])
        for i, layer in enumerate(codes.layers):
            rows = torch.stack(
                [store.read(layer=layer, sequences=int(q), positions=int(t))[0, 0] for q, t in zip(codes.sequence, codes.position, strict=True)]
            )  # fmt: skip
            expected = subject.sae.encode(rows.float())
            values, chosen = codes.padded(i)
            assert np.array_equal(values, expected.values[:, : values.shape[1]].numpy())
            is_active = values > 0
            assert np.array_equal(
                chosen[is_active], expected.indices[:, : values.shape[1]].numpy()[is_active]
            )
        n_rows += codes.passes.size
    assert 0 < sum(codes.passes.sum() for codes in written) < n_rows


def test_entries_are_active_latents_of_rows_that_pass(written):
    for codes in written:
        dense = np.zeros((len(codes), len(codes.layers), written.n_latents))
        for i in range(len(codes.layers)):
            values, chosen = codes.padded(i)
            np.add.at(dense[:, i], (np.arange(len(codes))[:, None], chosen), values)
        for aligned in (False, True):
            passes = codes.passes & codes.passes.all(1, keepdims=True) if aligned else codes.passes
            expected = np.where(passes[:, :, None] & (dense > 1e-3), dense, 0)
            found, e = np.zeros_like(dense), codes.entries(aligned=aligned)
            found[e.token, e.layer_i, e.latent] = e.activation
            assert np.array_equal(found, expected)
            assert len(e) == (expected > 0).sum()
        assert not codes.passes.all(1).all()


def test_plain_parquet_that_anybody_reads(written):
    table = pq.read_table(written.root / written.header["files"][0]["name"])
    assert table.schema.names == [field.name for field in module.SCHEMA]
    frame = table.slice(0, 4).to_pylist()
    assert [row["layer"] for row in frame] == [0, 1, 0, 1]
    assert frame[0]["sequence"] == frame[1]["sequence"]
    assert all(len(row["latents"]) == len(row["activations"]) > 0 for row in frame)
    assert all(row["activations"] == sorted(row["activations"], reverse=True) for row in frame)


def test_a_stopped_run_goes_on_and_gives_the_same(subject, written, tmp_path):
    calls = 0

    def stop(_n):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        encode_store(subject, out, split="train", on_rows=stop)
    with pytest.raises(UsageError, match="not finished"):
        LatentStore(out)
    done = json.loads((out / HEADER).read_text())["files"]
    assert len(done) == 1
    (out / ".tmp-shard-00009.parquet").write_bytes(b"left over")
    inode = (out / done[0]["name"]).stat().st_ino
    again = encode_store(subject, out, split="train")
    assert again.header == written.header
    assert (out / done[0]["name"]).stat().st_ino == inode, "a finished shard was done again"


def test_n_tokens_ends_with_a_sequence(subject, tmp_path):
    found = encode_store(subject, tmp_path / "latents", split="train", n_tokens=50)
    assert 50 <= found.n_tokens < 50 + 16
    assert found.n_tokens == sum(len(codes) for codes in found)


def test_no_rows_that_do_not_pass_is_not_no_rows(subject, tmp_path):
    """A filter that leaves nothing: everything is written, nothing passes."""
    provenance = {
        **subject.sae.provenance,
        "selection": {**subject.selection, "exclude_tokens": list(range(300))},
    }
    sae = dataclasses.replace(subject.sae, provenance=provenance)
    strict = dataclasses.replace(subject, saes=dict.fromkeys(subject.layers, sae))
    found = encode_store(strict, tmp_path / "latents")
    (codes,) = found
    assert len(codes) > 0
    assert not codes.passes.any()
    assert len(codes.entries()) == 0


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "swap"])
def test_damage_is_named(subject, written, harm):
    first, second = (written.root / file["name"] for file in written.header["files"][:2])
    data = bytearray(first.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
        first.write_bytes(data)
    elif harm == "truncate":
        first.write_bytes(data[:-1])
    elif harm == "remove":
        first.unlink()
    else:
        first.write_bytes(second.read_bytes())
    with pytest.raises(DamageError, match=first.name):
        list(LatentStore(written.root))


def test_other_latents_in_the_folder_are_refused(subject, written, tiny, tmp_path):
    with pytest.raises(PlanMismatchError, match="split: 'train' there, 'holdout' now"):
        encode_store(subject, written.root, split="holdout")
    with no_sync():
        train(tiny / "store.zarr", tmp_path / "other", "--hook", "resid_post", "--seed", "5")
    other = load_subject(tmp_path / "other", actcache.open(tiny / "store.zarr"))
    with pytest.raises(PlanMismatchError, match="sae: "):
        encode_store(other, written.root, split="train")


def test_refusals(subject, written, tmp_path):
    with pytest.raises(NotFoundError, match="actcache encode"):
        LatentStore(tmp_path / "nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("!")
    with pytest.raises(UsageError, match="not empty"):
        encode_store(subject, tmp_path / "full")
    shutil.copytree(written.root, tmp_path / "copy")
    header = tmp_path / "copy" / HEADER
    header.write_text(header.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UsageError, match="format 2; this actcache reads format 1"):
        LatentStore(tmp_path / "copy")
    header.write_text("{")
    with pytest.raises(DamageError, match="cannot be read"):
        LatentStore(tmp_path / "copy")


def test_a_run_is_looked_at_on_its_own_models_rows_only(tiny, tmp_path):
    sae_json = json.loads((tiny / "run" / "sae.json").read_text())
    shutil.copytree(tiny / "run", tmp_path / "run")
    for change, message in (
        ({"model": {**sae_json["provenance"]["model"], "digest": "0" * 64}}, "other weights"),
        ({"selection": {}}, "not made by 'actcache train'"),
    ):
        altered = {**sae_json, "provenance": {**sae_json["provenance"], **change}}
        (tmp_path / "run" / "sae.json").write_text(json.dumps(altered))
        with pytest.raises(UsageError, match=message):
            load_subject(tmp_path / "run", actcache.open(tiny / "store.zarr"))


def test_the_header_is_what_its_page_says(written):
    page = (DOCS / "reference" / "latents.md").read_text(encoding="utf-8")
    (table,) = tables(sections(page, 2)["latents.json"])
    header = json.loads((written.root / HEADER).read_text())
    assert {unquoted(row["field"]) for row in table} == set(header)
    (files,) = (row["meaning"] for row in table if row["field"] == "`files`")
    assert set(re.findall(r"`(\w+)`", files)) == set(header["files"][0])
    assert header["format"] == FORMAT == 1
