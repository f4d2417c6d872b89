"""docs/format.md against the schema, against a freshly built store, and against a reader written from the page alone."""

import ast
import hashlib
import importlib.util
import json
import sys
import types
import typing

import numpy as np
import pytest
from pydantic import BaseModel

from actcache.producer.repair import repair
from actcache.store import keyed, schema
from actcache.store.arrays import decode_strings
from actcache.store.disk import Disk
from actcache.store.open import open_catalog
from actcache.store.retire import remove_retired, retire
from tests.conftest import make_decoder, write_store
from tests.docs.pages import DOCS, ROOT, blocks, sections, tables, unquoted

PAGE = DOCS / "format.md"
TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = sections(TEXT, 2)
RECORDS = sections(SECTIONS["4. Records"], 3)
EXAMPLE = ROOT / "examples" / "read_without_actcache.py"


# Records.


def in_words(annotation) -> str:
    """A type as the page names it."""
    if annotation == schema.Hex:
        return "hex"
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return in_words(args[0])
    if origin is typing.Literal:
        return " or ".join(json.dumps(value) for value in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else in_words(a) for a in args)
    if origin is tuple:
        if args[1] is Ellipsis:
            return f"[{in_words(args[0])}]"
        return f"({', '.join(map(in_words, args))})"
    if origin is dict:
        return f"{{string: {in_words(args[1])}}}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.__name__
    return {int: "integer", str: "string", bool: "boolean", float: "number"}[annotation]


def record_classes() -> list[type[BaseModel]]:
    found = [c for c in vars(schema).values() if isinstance(c, type) and issubclass(c, schema.Record)]
    return [c for c in found if c is not schema.Record]


def test_every_record_has_a_table_and_every_table_a_record():
    assert set(RECORDS) == {c.__name__ for c in record_classes()}
    assert len(RECORDS) > 10


@pytest.mark.parametrize("record", record_classes(), ids=lambda c: c.__name__)
def test_table_of_a_record_is_its_fields(record):
    (table,) = tables(RECORDS[record.__name__])
    hints = typing.get_type_hints(record, include_extras=True)
    expected = [(name, in_words(hints[name])) for name in record.model_fields]
    assert [(unquoted(row["field"]), row["type"]) for row in table] == expected
    assert all(row["meaning"] for row in table)


# Arrays, keys and codecs, on disk.


def test_ledger_has_the_generations_that_the_page_says():
    assert f"[{schema.LEDGER_GENERATIONS}, n_shards]" in SECTIONS["5. Arrays"]


@pytest.fixture(
    params=[
        ("bfloat16", "zstd"),
        ("bfloat16", "lz4"),
        ("float16", "none"),
        ("float32", "zstd"),
        ("bfloat16", "uint8"),
        ("float32", "uint8"),
    ],
    ids=lambda p: "-".join(p),
)
def truth(request, tmp_path):
    """Three shards and a padded end, two hooks; made without a model, read with one page."""
    dtype, codec = request.param
    return write_store(
        tmp_path / "t.zarr",
        n_sequences=10,
        seq_len=9,
        per_shard=4,
        rows_per_chunk=8,
        n_padding=5,
        dtype=dtype,
        codec=codec,
        hooks=("resid_post", "mlp_out"),
    )


def names_of(grid: dict, capture: dict) -> dict[str, int]:
    return {
        **grid,
        "n_rows": grid["n_shards"] * grid["rows_per_shard"],
        "n_chunks": grid["n_shards"] * (grid["rows_per_shard"] // grid["rows_per_chunk"]),
        "n_layers": len(capture["layers"]),
        "width": capture["width"],
    }


def evaluate(expression: str, names: dict):
    """Arithmetic of the page."""
    return eval(compile(ast.parse(expression, mode="eval"), "format.md", "eval"), {"min": min}, names)


def read_json(path):
    return json.loads(path.read_bytes())


def attributes(path):
    return read_json(path / "zarr.json")["attributes"]["actcache"]


def expected_chain(codec: str, itemsize: int, n_items: int) -> list[dict]:
    """The Zarr codecs of a chunk, as section 6 describes them."""
    chain: list[dict] = [{"name": "bytes"}]
    if itemsize > 1:
        chain[0]["configuration"] = {"endian": "little"}
    (settings,) = [t for t in tables(SECTIONS["6. Numbers and codecs"]) if "cname" in t[0]]
    by_name = {row["codec"]: row for row in settings}
    if codec != "none":
        row = by_name[codec]
        blosc = {
            "typesize": itemsize,
            "cname": row["cname"],
            "clevel": int(row["clevel"]),
            "shuffle": row["shuffle"],
            "blocksize": evaluate(row["blocksize"], {"chunk_bytes": itemsize * n_items}),
        }
        chain.append({"name": "blosc", "configuration": blosc})
    return [*chain, {"name": "crc32c"}]


def test_every_file_and_every_array_is_what_the_page_says(truth):
    root = truth.root
    grid = attributes(root)["plan"]["grid"]
    plan_table, capture_table, quantised_table = tables(SECTIONS["5. Arrays"])
    is_quantised = attributes(root / "acts/mlp_out")["capture"]["codec"] == "uint8"
    if is_quantised:
        capture_table = capture_table + quantised_table
    (dtypes,) = [t for t in tables(SECTIONS["6. Numbers and codecs"]) if "logical dtype" in t[0]]
    dtypes = {row["logical dtype"]: row for row in dtypes}
    files = {"zarr.json", "acts/zarr.json"}
    captures = sorted(p.name for p in (root / "acts").iterdir() if p.is_dir())
    assert captures == ["mlp_out", "resid_post"]
    for name in [None, *captures]:
        base = "" if name is None else f"acts/{name}/"
        capture = attributes(root / "acts" / (name or captures[0]))["capture"]
        names = names_of(grid, capture)
        if name is not None:
            files.add(f"{base}zarr.json")
        for row in plan_table if name is None else capture_table:
            path = unquoted(row["path"])
            found = read_json(root / base / path / "zarr.json")
            files.add(f"{base}{path}/zarr.json")
            key = unquoted(row["key of a shard's object"])
            for shard in range(grid["n_shards"] if path != "retired" else 0):
                files.add(base + eval(f"f{key!r}", {"shard": shard, "generation": 0}))
            chunk = [evaluate(d, names) for d in row["object shape"].strip("[]").split(", ")]
            assert found["shape"] == [evaluate(d, names) for d in row["shape"].strip("[]").split(", ")], path
            assert found["chunk_grid"]["configuration"]["chunk_shape"] == chunk, path
            assert found["dimension_names"] == row["dimensions"].split(", "), path
            assert found["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "."}}
            dtype, fill = row["dtype"], row["fill"]
            if dtype == "rows":
                stored = dtypes[capture["dtype"]]
                dtype, fill = stored["dtype on disk"], stored["fill of `rows`"]
                assert np.dtype(dtype).itemsize == int(stored["bytes"])
                said = {"dtype": capture["dtype"]}
                if is_quantised and path == "rows":
                    dtype, fill = "uint8", "255"
                    said["codec"] = "uint8"
                assert found["attributes"] == {"actcache": said}
            assert found["data_type"] == dtype, path
            assert found["fill_value"] == json.loads(fill), path
            codec = {"rows": "none", "exact": "zstd"}.get(path) if is_quantised else capture["codec"]
            assert found["codecs"] == expected_codecs(row["codecs"], dtype, chunk, names, codec), path
    on_disk = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    assert on_disk == files


def expected_codecs(said: str, dtype: str, chunk: list[int], names: dict, codec: str | None) -> list[dict]:
    if said == "strings":
        return [{"name": "vlen-utf8", "configuration": {}}]
    itemsize = np.dtype(dtype).itemsize
    if said == "zstd":
        return expected_chain("zstd", itemsize, int(np.prod(chunk)))
    assert said == "sharded"
    inner = [1, names["rows_per_chunk"], names["width"]]
    return [
        {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": inner,
                "codecs": expected_chain(codec, itemsize, int(np.prod(inner))),
                "index_codecs": [
                    {"name": "bytes", "configuration": {"endian": "little"}},
                    {"name": "crc32c"},
                ],
                "index_location": "end",
            },
        }
    ]


def test_retiring_removes_what_the_page_says(truth):
    """In the order of the page: the record is there before anything is gone."""
    before = {p.relative_to(truth.root).as_posix() for p in truth.root.rglob("*") if p.is_file()}
    catalog, steps = open_catalog(str(truth.root)), []
    with Disk(truth.root, lambda *step: steps.append(step)) as disk:
        retire(disk, catalog.arrays["retired"], catalog.plan, 1, {"a": 2}, "test")
        remove_retired(disk, (found.arrays for found in catalog.captures.values()), 1)
    after = {p.relative_to(truth.root).as_posix() for p in truth.root.rglob("*") if p.is_file()}
    _plan_table, capture_table, quantised_table = tables(SECTIONS["5. Arrays"])
    of_quantised = (
        quantised_table if any(c.capture.codec == "uint8" for c in catalog.captures.values()) else []
    )
    listed = [*capture_table, *of_quantised]
    keys = {unquoted(row["path"]): unquoted(row["key of a shard's object"]) for row in listed}
    (step,) = [
        line for line in SECTIONS["9. Ledger and commit"].splitlines() if "of the shard are removed" in line
    ]
    gone = [name for name in keys if f"`{name}`" in step]
    named_there = {
        f"acts/{hook}/" + eval(f"f{keys[name]!r}", {"shard": 1})
        for hook in ("mlp_out", "resid_post")
        for name in gone
    }
    assert {f"acts/{hook}/rows/c.0.1.0" for hook in ("mlp_out", "resid_post")} <= named_there
    assert before - after == named_there & before
    assert after - before == {"retired/c.1"}
    named = [key for name, key in steps if name in ("link", "remove")]
    assert named[0] == "retired/c.1"
    assert set(named[1:]) == before - after
    (text,) = decode_strings((truth.root / "retired/c.1").read_bytes())
    record = json.loads(text)
    assert record["consumers"] == {"a": 2}
    assert record["digest"] == schema.digest_of(
        {k: v for k, v in record.items() if k not in ("digest", "producer")}
    )


def test_tree_names_every_folder(truth):
    tree = SECTIONS["2. Tree"].replace("HOOK", "resid_post")
    for path in truth.root.rglob("*"):
        if path.is_dir() and path.name != "mlp_out":
            assert f"{path.name}/" in tree


def test_digests_of_documents_and_moments_names(truth):
    plan = attributes(truth.root)["plan"]
    plan_table, capture_table, quantised_table = tables(SECTIONS["5. Arrays"])
    if attributes(truth.root / "acts/mlp_out")["capture"]["codec"] == "uint8":
        capture_table = capture_table + quantised_table
        said = ["n_rows", "mean", "sum_squared_deviations", "sum_squared_errors"]
        assert attributes(truth.root / "acts/mlp_out/error")["error"] == said
    assert set(plan["metadata"]) == {unquoted(row["path"]) for row in plan_table} | {"acts"}
    for path, digest in plan["metadata"].items():
        assert hashlib.sha256((truth.root / path / "zarr.json").read_bytes()).hexdigest() == digest
    for hook in ("resid_post", "mlp_out"):
        folder = truth.root / "acts" / hook
        capture = attributes(folder)["capture"]
        assert set(capture["metadata"]) == {unquoted(row["path"]) for row in capture_table}
        for path, digest in capture["metadata"].items():
            assert hashlib.sha256((folder / path / "zarr.json").read_bytes()).hexdigest() == digest
        assert attributes(folder / "moments")["moments"] == ["mean", "sum_squared_deviations", "min", "max"]
        assert attributes(folder / "totals")["totals"] == [
            "n_rows",
            "norm_sum",
            "norm_sum_squares",
            "norm_max",
            "n_non_finite",
        ]


# Randomness.


def test_vectors_and_functions_of_the_page():
    names: dict = {}
    (code,) = [b for b in blocks(PAGE) if b.language == "python"]
    exec(compile(code.text, str(PAGE), "exec"), names)
    (block,) = [b for b in blocks(PAGE) if b.language == "json"]
    vectors = json.loads(block.text)
    key = names["derive"](vectors["seed"], *vectors["labels"])
    assert key == vectors["derive"] == keyed.derive(vectors["seed"], *vectors["labels"])
    hashes = [names["hash_u64"](key, i) for i in range(3)]
    assert hashes == vectors["hash_u64 of 0, 1, 2"] == keyed.hash_u64(key, np.arange(3)).tolist()
    assert names["permutation"](key, 10) == vectors["permutation of 10"]
    for n in (0, 1, 257):
        assert names["permutation"](key, n) == keyed.permutation(key, n).tolist()


# A reader written from the page.


@pytest.fixture(scope="module")
def reader():
    spec = importlib.util.spec_from_file_location("read_without_actcache", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_independent_reader_imports_nothing_of_ours():
    imported = set()
    for node in ast.walk(ast.parse(EXAMPLE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"numpy", "numcodecs"}


def test_the_independent_reader_reads_every_row(truth, reader):
    store = reader.Store(truth.root)
    q, t = np.nonzero(truth.is_stored)
    for i in range(0, len(q), 7):
        for layer_i, layer in enumerate(truth.layers):
            expected = truth.floats("mlp_out")[layer_i, q[i], t[i]]
            assert np.array_equal(store.row(layer, int(q[i]), int(t[i]), "mlp_out"), expected)


def test_the_independent_reader_notices_swapped_shards(truth, reader):
    rows = truth.root / "acts" / "resid_post" / "rows"
    a, b = rows / "c.0.0.0", rows / "c.0.1.0"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    with pytest.raises(OSError, match="chunk"):
        reader.Store(truth.root).row(0, 0, 0)


@pytest.mark.parametrize("codec", ["zstd", "uint8"])
def test_a_rebuilt_shard_lies_where_the_page_says(make_store, tmp_path, reader, codec):
    """Section 9: objects of generation g under names that begin with g, and Zarr's names for them too."""
    root = make_store(tmp_path, codec=codec)
    plan_files = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    before = reader.Store(root).row(1, 9, 3)
    rows = root / "acts/resid_post/rows/c.0.1.0"
    rows.write_bytes(rows.read_bytes()[:-1])
    assert repair(str(root), lambda _catalog: make_decoder()).left == []
    _, of_capture, of_quantised = tables(SECTIONS["5. Arrays"])
    keys = [unquoted(row["key of a shard's object"]) for row in of_capture if row["path"] != "`layer`"]
    keys += [unquoted(row["key of a shard's object"]) for row in of_quantised if codec == "uint8"]
    expected = set()
    for key in (eval(f"f{key!r}", {"shard": 1, "generation": 1}) for key in keys):
        expected.add("acts/resid_post/" + (key if key.startswith("ledger") else key.replace("/c.", "/g1.")))
    assert {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} - plan_files == expected
    assert np.array_equal(reader.Store(root).row(1, 9, 3), before)
    (root / "acts/resid_post/rows/g1.0.1.0").unlink()
    with pytest.raises(FileNotFoundError):
        reader.Store(root).row(1, 9, 3)
