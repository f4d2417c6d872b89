"""Stores from others' activations: every row is the source's, bit for bit, and whatever is wrong is named.

Each `write_` function lays files out as the format's own writer does. Axes: l layers, q sequences, t positions, d width.
"""

import json
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

import actcache
from actcache.errors import (
    CorpusError,
    DiskFullError,
    NonFiniteError,
    NotFoundError,
    PlanMismatchError,
    UsageError,
)
from actcache.producer.importing import (
    Facts,
    ImportReporter,
    ImportSettings,
    formats,
    import_activations,
    layout,
    open_source,
    run,
)
from actcache.producer.importing.layout import named_digest
from actcache.producer.importing.source import SourceFile, layer_in
from actcache.store.arrays import NO_DOCUMENT
from tests.conftest import all_files, as_bits, random_acts

pytestmark = pytest.mark.usefixtures("fast_disk")

SHAPE = (13, 6, 4)  # q, t, d
LAYERS = (3, 11)


def make_acts(dtype: str = "float32", shape=SHAPE, layers=LAYERS, seed: int = 0) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {layer: random_acts(rng, shape, dtype) for layer in layers}


def make_tokens(shape=SHAPE[:2]) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 1000, shape)


def settings(out: Path, **changes) -> ImportSettings:
    chosen = {"holdout_frac": 0.25, "sequences_per_shard": 4, "rows_per_chunk": 8}
    return ImportSettings(out=out, **chosen | changes)


# Writers, in each format's own layout.


def write_npy(folder: Path, acts: dict[int, np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    for layer, values in acts.items():
        np.save(folder / f"layer_{layer}.npy", values)
    return folder


def as_tensor(values: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(values.copy())
    return tensor.view(torch.bfloat16) if values.dtype == np.uint16 else tensor


def write_safetensors(path: Path, acts: dict[int, np.ndarray], **others: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"layer_{layer}": as_tensor(values) for layer, values in acts.items()}
    save_file(tensors | {name: torch.from_numpy(v) for name, v in others.items()}, path)
    return path


def arrow_table(column: str, acts: np.ndarray, tokens: np.ndarray | None, huge: bool = False) -> pa.Table:
    """Array2D as `datasets` stores it: an extension type over lists of lists."""
    q, t, d = acts.shape
    values = pa.array(acts.reshape(-1))
    for n, size in ((q * t, d), (q, t)):
        values = pa.ListArray.from_arrays(np.arange(0, n * size + 1, size, dtype=np.int32), values)
    name = {"float16": "float16", "float32": "float32", "float64": "float64"}[acts.dtype.name]
    metadata = {
        "ARROW:extension:name": "datasets.features.features.Array2DExtensionType",
        "ARROW:extension:metadata": json.dumps([[t, d], name]),
    }
    fields, columns = [pa.field(column, values.type, metadata=metadata)], [values]
    if tokens is not None:
        ids = pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1), pa.int32()), t)
        fields.append(pa.field("token_ids", ids.type))
        columns.append(ids)
    schema = pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": {}}})})
    return pa.Table.from_arrays(columns, schema=schema)


def write_saelens(
    folder: Path,
    column: str,
    acts: np.ndarray,
    tokens: np.ndarray | None,
    parts: tuple[int, ...] = (5, 6, 2),
    batch: int = 3,
    options: pa.ipc.IpcWriteOptions | None = None,
) -> Path:
    folder.mkdir(parents=True)
    _q, t, d = acts.shape
    names, at = [], 0
    for i, n in enumerate(parts):
        names.append(f"data-{i:05d}-of-{len(parts):05d}.arrow")
        table = arrow_table(column, acts[at : at + n], None if tokens is None else tokens[at : at + n])
        with pa.ipc.new_stream(folder / names[-1], table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=batch)
        at += n
    features = {column: {"shape": [t, d], "dtype": acts.dtype.name, "_type": "Array2D"}}
    if tokens is not None:
        features["token_ids"] = {
            "feature": {"dtype": "int32", "_type": "Value"},
            "length": t,
            "_type": "Sequence",
        }
    (folder / "dataset_info.json").write_text(
        json.dumps({"citation": "", "description": "", "features": features, "homepage": "", "license": ""})
    )
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "f00d",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state))
    return folder


SAEV_NAMES = {
    "1.0.0": ("vit_family", "vit_ckpt", "n_patches_per_img", "d_vit", "n_imgs", "max_patches_per_shard"),
    "1.1": ("vit_family", "vit_ckpt", "n_patches_per_img", "d_vit", "n_imgs", "max_patches_per_shard"),
    "2.0": ("family", "ckpt", "patches_per_ex", "d_model", "n_ex", "patches_per_shard"),
    "2.1": (
        "family",
        "ckpt",
        "content_tokens_per_example",
        "d_model",
        "n_examples",
        "max_tokens_per_shard",
    ),
}


def write_saev(
    folder: Path,
    acts: dict[int, np.ndarray],
    per_shard: int = 5,
    protocol: str = "2.1",
    has_cls: bool = True,
    **changes,
) -> Path:
    """As saev's ShardWriter: files of full size, and one more of no examples where the others are exactly full."""
    folder.mkdir(parents=True)
    q, t, d = next(iter(acts.values())).shape
    family, ckpt, content, width, n_examples, budget = SAEV_NAMES[protocol]
    metadata = {
        family: "dinov2",
        ckpt: "dinov2_vitb14_reg",
        "layers": list(acts),
        content: t - has_cls,
        "cls_token": has_cls,
        width: d,
        n_examples: q,
        budget: per_shard * t * len(acts) + 1,
        "data": "gASVCwAAAA==",
        "dataset": "images",
        "pixel_agg": None,
        "dtype": "float32",
        "protocol": protocol,
    }
    (folder / "metadata.json").write_text(json.dumps(metadata | changes))
    logical = np.stack(list(acts.values()), 1)  # [example, layer, token, width]
    shards = []
    for i in range(q // per_shard + 1):
        part = logical[i * per_shard : (i + 1) * per_shard]
        full = np.zeros((per_shard, *logical.shape[1:]), np.float32)
        full[: len(part)] = part
        full.tofile(folder / f"acts{i:06d}.bin")
        shards.append({"name": f"acts{i:06d}.bin", n_examples: len(part)})
    (folder / "shards.json").write_text(json.dumps(shards))
    return folder


# The oracle.


def check_store(
    out: Path, acts: dict[int, np.ndarray], tokens: np.ndarray | None = None, document=None, exclude_first=1
):
    """Every row of the source is in the store once, bit for bit, read whole and streamed; and nothing else is."""
    store = actcache.open(out)
    assert store.is_complete
    assert store.layers == tuple(acts)
    first = next(iter(acts.values()))
    q, t, _d = first.shape
    stored = np.flatnonzero(store.document[:, 0] != NO_DOCUMENT)
    number_of = {first[i].tobytes(): i for i in range(q)}
    found = store.read(layer=store.layers[0], sequences=stored.tolist())
    numbers = np.array([number_of[as_bits(x).view(first.dtype).tobytes()] for x in found])
    assert sorted(numbers) == list(range(q))
    for layer, values in acts.items():
        assert np.array_equal(
            as_bits(store.read(layer=layer, sequences=stored.tolist())), as_bits(values[numbers])
        )
    assert (store.document[stored] == (numbers if document is None else document[numbers])[:, None]).all()
    assert np.array_equal(store.tokens[stored], np.zeros((q, t)) if tokens is None else tokens[numbers])
    special = store.plan.request.tokenizer.special_ids
    kept = np.arange(t) >= exclude_first
    kept = kept & ~np.isin(store.tokens[stored], special)
    assert np.array_equal(store.keep[stored], kept)
    source_of = dict(zip(stored.tolist(), numbers.tolist(), strict=True))
    seen = set()
    for split in ("train", "holdout") if store.plan.grid.n_holdout_shards else ("train",):
        for batch in store.stream(batch_size=16, split=split, seed=1, window_rows=64, partitions=2):
            for i, bits in enumerate(as_bits(batch.rows)):
                layer, number, position = (
                    int(batch.layer[i]),
                    source_of[int(batch.sequence[i])],
                    int(batch.position[i]),
                )
                assert np.array_equal(bits, as_bits(acts[layer][number, position]))
                assert (layer, number, position) not in seen
                seen.add((layer, number, position))
    assert len(seen) == kept.sum() * len(acts)
    return store


# Every format, row for row.


@pytest.mark.parametrize("codec", ["zstd", "lz4", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_npy_sequences(tmp_path, dtype, codec):
    acts, tokens = make_acts(dtype), make_tokens()
    folder = write_npy(tmp_path / "in", acts)
    np.save(folder / "tokens.npy", tokens)
    summary = import_activations(open_source(folder), settings(tmp_path / "s.zarr", codec=codec))
    assert (summary.n_shards, summary.n_imported, summary.n_tokens) == (4, 4, 13 * 6)
    store = check_store(tmp_path / "s.zarr", acts, tokens)
    assert store.plan.request.tokenizer.vocab_size == tokens.max() + 1


@pytest.mark.parametrize("is_void", [False, True])
def test_npy_of_bfloat16_bits(tmp_path, is_void):
    acts = make_acts("bfloat16")
    folder = write_npy(
        tmp_path / "in", {n: a.view(ml_dtypes.bfloat16) if is_void else a for n, a in acts.items()}
    )
    with pytest.raises(CorpusError, match=r"layer_3\.npy holds (uint16|void16).*--bfloat16-bits"):
        open_source(folder)
    import_activations(open_source(folder, bfloat16_bits=True), settings(tmp_path / "s.zarr"))
    check_store(tmp_path / "s.zarr", acts)


def test_npy_rows_are_sequences_of_one_position(tmp_path):
    rows = random_acts(np.random.default_rng(0), (301, 5), "float32")
    np.save(tmp_path / "rows.npy", rows)
    with pytest.raises(UsageError, match=r"no layer number in rows\.npy.*--layer-of rows\.npy=N"):
        open_source(tmp_path / "rows.npy")
    source = open_source(tmp_path / "rows.npy", layer_of={"rows.npy": 8}, hook="mlp_out")
    assert (source.facts.n_sequences, source.facts.seq_len, source.facts.exclude_first) == (301, 1, 0)
    import_activations(source, settings(tmp_path / "s.zarr", sequences_per_shard=64, rows_per_chunk=16))
    store = check_store(tmp_path / "s.zarr", {8: rows[:, None]}, exclude_first=0)
    assert store.hooks == ("mlp_out",)


def test_a_chosen_layer_and_default_grid(tmp_path):
    acts = make_acts()
    folder = write_npy(tmp_path / "in", acts)
    chosen = ImportSettings(out=tmp_path / "s.zarr", layers=(11,), holdout_frac=0.0, exclude_first=2)
    import_activations(open_source(folder), chosen)
    store = check_store(tmp_path / "s.zarr", {11: acts[11]}, exclude_first=2)
    assert store.plan.grid.n_holdout_shards == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_safetensors_file(tmp_path, dtype):
    acts, tokens = make_acts(dtype), make_tokens()
    path = write_safetensors(tmp_path / "acts.safetensors", acts, tokens=tokens)
    source = open_source(path)
    assert source.facts.dtype == dtype
    import_activations(source, settings(tmp_path / "s.zarr", special_ids=tuple(tokens[:3, 4].tolist())))
    check_store(tmp_path / "s.zarr", acts, tokens)


def test_safetensors_parts_are_laid_end_to_end_in_the_order_of_their_numbers(tmp_path):
    acts, tokens = make_acts("bfloat16", (23, 6, 4)), make_tokens((23, 6)).astype(np.int32)
    for i in range(12):
        at = slice(i * 2, i * 2 + 2)
        part = {layer: values[at] for layer, values in acts.items()}
        write_safetensors(tmp_path / "in" / f"part-{i}.safetensors", part, tokens=tokens[at])
    source = open_source(tmp_path / "in")
    assert np.array_equal(source.read(3, np.arange(23)), acts[3])
    import_activations(source, settings(tmp_path / "s.zarr"))
    check_store(tmp_path / "s.zarr", acts, tokens)


def test_safetensors_file_per_layer_of_rows(tmp_path):
    acts = make_acts("bfloat16", (50, 4))
    for layer, values in acts.items():
        write_safetensors(tmp_path / "in" / f"{layer}.safetensors", {layer: values})
    import_activations(open_source(tmp_path / "in"), settings(tmp_path / "s.zarr"))
    check_store(tmp_path / "s.zarr", {n: v[:, None] for n, v in acts.items()}, exclude_first=0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("has_tokens", [True, False])
def test_saelens(tmp_path, dtype, has_tokens):
    acts, tokens = make_acts(dtype, layers=(5,)), make_tokens() if has_tokens else None
    folder = write_saelens(tmp_path / "cache", "blocks.5.hook_resid_pre", acts[5], tokens)
    source = open_source(folder)
    assert (source.facts.format, source.facts.hook, source.facts.layers) == ("saelens", "resid_pre", (5,))
    import_activations(source, settings(tmp_path / "s.zarr"))
    check_store(tmp_path / "s.zarr", acts, tokens)


def test_saelens_with_datasets_type_registered(tmp_path):
    """Where `datasets` was imported, Arrow hands out extension arrays."""

    class Array2D(pa.ExtensionType):
        def __init__(self, storage):
            super().__init__(storage, "datasets.features.features.Array2DExtensionType")

        def __arrow_ext_serialize__(self):
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage, serialized):
            return cls(storage)

    acts, tokens = make_acts(layers=(5,)), make_tokens()
    folder = write_saelens(tmp_path / "cache", "blocks.5.hook_resid_post", acts[5], tokens)
    pa.register_extension_type(Array2D(pa.list_(pa.list_(pa.float32()))))
    try:
        assert np.array_equal(open_source(folder).read(5, np.arange(13)), acts[5])
    finally:
        pa.unregister_extension_type("datasets.features.features.Array2DExtensionType")


def test_saelens_hook_of_a_plain_model(tmp_path):
    acts = make_acts(layers=(1,))
    folder = write_saelens(tmp_path / "cache", "transformer.h.1", acts[1], None)
    with pytest.raises(UsageError, match=r"which hook transformer\.h\.1 is.*--hook"):
        open_source(folder)
    import_activations(open_source(folder, hook="resid_post"), settings(tmp_path / "s.zarr"))
    check_store(tmp_path / "s.zarr", acts)


def test_saelens_caches_of_several_layers(tmp_path):
    acts, tokens = make_acts(), make_tokens()
    for layer, values in acts.items():
        write_saelens(tmp_path / "caches" / str(layer), f"blocks.{layer}.hook_resid_post", values, tokens)
    import_activations(open_source(tmp_path / "caches"), settings(tmp_path / "s.zarr"))
    check_store(tmp_path / "s.zarr", acts, tokens)
    one = open_source(tmp_path / "caches", layer_of={"blocks.11.hook_resid_post": 12})
    assert one.facts.layers == (12,)
    with pytest.raises(UsageError, match=r"no cache in .*caches has a column blocks\.4"):
        open_source(tmp_path / "caches", layer_of={"blocks.4": 4})
    tokens[8, 1] += 1
    write_saelens(tmp_path / "caches" / "4", "blocks.4.hook_resid_post", acts[3], tokens)
    with pytest.raises(CorpusError, match=r"sequence 8 has other tokens in .*4 than in .*3"):
        open_source(tmp_path / "caches")


def test_saelens_caches_of_one_layer_do_not_merge(tmp_path):
    acts = make_acts(layers=(5,))
    for name in "ab":
        write_saelens(tmp_path / "caches" / name, "blocks.5.hook_resid_post", acts[5], None)
    with pytest.raises(CorpusError, match=r"a \(layer 5\) and .*b \(layer 5\) are both layer 5"):
        open_source(tmp_path / "caches")
    write_saelens(tmp_path / "caches" / "b2", "blocks.6.hook_resid_post", acts[5][:12], None, parts=(12,))
    with pytest.raises(CorpusError, match=r"b2 has n_sequences 12, but .*a has 13"):
        open_source(tmp_path / "caches")


@pytest.mark.parametrize(
    ("q", "per_shard", "protocol", "has_cls"),
    [
        (13, 5, "2.1", True),
        (10, 5, "2.1", True),  # exactly full: saev adds a shard of no examples
        (13, 5, "2.1", False),
        (13, 20, "2.0", True),
        (10, 3, "1.1", True),
        (4, 2, "1.0.0", False),
    ],
)
def test_saev(tmp_path, q, per_shard, protocol, has_cls):
    acts = make_acts(shape=(q, 6, 4), layers=(2, 7, 11))
    folder = write_saev(tmp_path / "saev", acts, per_shard, protocol, has_cls)
    source = open_source(folder)
    import_activations(source, settings(tmp_path / "s.zarr"))
    store = check_store(tmp_path / "s.zarr", acts, exclude_first=int(has_cls))
    model = store.plan.request.model
    assert (model.name, model.family) == ("dinov2_vitb14_reg", "dinov2")


def test_saev_last_shard_of_its_own_size_and_layers_from_the_end(tmp_path):
    acts = make_acts(layers=(-2, 7))
    folder = write_saev(tmp_path / "saev", acts)
    last = folder / "acts000002.bin"
    last.write_bytes(last.read_bytes()[: 3 * 2 * 6 * 4 * 4])
    with pytest.raises(UsageError, match=r"no layer number in -2.*--layer-of -2=N"):
        open_source(folder)
    import_activations(open_source(folder, layer_of={"-2": 10, "7": 7}), settings(tmp_path / "s.zarr"))
    check_store(tmp_path / "s.zarr", {7: acts[7], 10: acts[-2]})


# Documents, conversion, what the plan says.


def test_documents_go_whole_to_one_side(tmp_path):
    acts = make_acts(shape=(40, 6, 4))
    document = np.random.default_rng(3).integers(0, 12, 40) * 5
    folder = write_npy(tmp_path / "in", acts)
    np.save(folder / "document.npy", document)
    import_activations(open_source(folder), settings(tmp_path / "s.zarr"))
    store = check_store(tmp_path / "s.zarr", acts, document=document)
    n = store.plan.grid.n_holdout_sequences
    held_out, train = set(store.document[:n].ravel().tolist()), set(store.document[n:].ravel().tolist())
    assert held_out - {NO_DOCUMENT}
    assert not (held_out & train - {NO_DOCUMENT})
    np.save(folder / "document.npy", np.zeros(40, np.int64))
    with pytest.raises(CorpusError, match="documents go whole to one side"):
        import_activations(open_source(folder), settings(tmp_path / "other.zarr"))


def test_order_is_shuffled_and_depends_on_the_seed(tmp_path):
    folder = write_npy(tmp_path / "in", make_acts(shape=(200, 1, 4)))
    orders = []
    for seed in (0, 1):
        out = tmp_path / f"{seed}.zarr"
        import_activations(open_source(folder), settings(out, seed=seed, sequences_per_shard=50))
        orders.append(actcache.open(out).document[:, 0])
    for order in orders:
        assert sorted(order) == list(range(200))
        assert abs(np.corrcoef(order, np.arange(200))[0, 1]) < 0.3
    assert not np.array_equal(*orders)


@pytest.mark.parametrize("there", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("here", ["float32", "float16", "bfloat16"])
def test_conversion_rounds_to_nearest(tmp_path, there, here):
    wide = np.random.default_rng(0).standard_normal(SHAPE)
    types = {"bfloat16": ml_dtypes.bfloat16}
    given = wide.astype(types.get(there, there))
    expected = given.astype(types.get(here, here))
    folder = write_npy(tmp_path / "in", {3: given.view(np.uint16) if there == "bfloat16" else given})
    source = open_source(folder, bfloat16_bits=True)
    import_activations(source, settings(tmp_path / "s.zarr", dtype=here))
    check_store(tmp_path / "s.zarr", {3: expected.view(np.uint16) if here == "bfloat16" else expected})


def test_float64_needs_a_dtype(tmp_path):
    folder = write_npy(tmp_path / "in", {0: np.zeros((4, 2, 3))})
    with pytest.raises(UsageError, match="holds float64, which a store does not; choose --dtype"):
        import_activations(open_source(folder), settings(tmp_path / "s.zarr"))


def test_what_is_unknown_says_so(tmp_path):
    acts = make_acts()
    folder = write_npy(tmp_path / "in", acts)
    import_activations(open_source(folder), settings(tmp_path / "a.zarr"))
    import_activations(
        open_source(folder), settings(tmp_path / "b.zarr", model_name="gpt2", tokenizer_name="gpt2")
    )
    a, b = (actcache.open(tmp_path / f"{name}.zarr").plan.request for name in "ab")
    assert (a.model.name, a.model.family, a.model.revision) == ("unknown", "unknown", None)
    assert (a.device, a.batch_size, a.n_tokens) == ("import", 0, None)
    assert a.model.digest == named_digest("model", "unknown")
    assert b.model.digest == named_digest("model", "gpt2") != b.tokenizer.digest
    assert (a.model.n_layers, a.model.width, a.corpus.name) == (12, 4, "in")
    (source,) = a.corpus.sources
    assert (source.kind, source.column) == ("activations", "npy")
    assert source.files == tuple(
        (name, (folder / name).stat().st_size) for name in ("layer_11.npy", "layer_3.npy")
    )
    assert str(tmp_path) not in (tmp_path / "a.zarr" / "zarr.json").read_text()


# Wrong files: one error each, naming the file.


def spoil(path: Path, how) -> None:
    path.write_bytes(how(path.read_bytes()))


def npy_case(change):
    def write(tmp_path: Path) -> Path:
        folder = write_npy(tmp_path / "in", make_acts())
        change(folder)
        return folder

    return write


def safetensors_case(change):
    def write(tmp_path: Path) -> Path:
        for layer, values in make_acts().items():
            write_safetensors(tmp_path / "in" / f"{layer}.safetensors", {layer: values})
        change(tmp_path / "in")
        return tmp_path / "in"

    return write


def saelens_case(change):
    def write(tmp_path: Path) -> Path:
        folder = write_saelens(
            tmp_path / "in", "blocks.5.hook_resid_post", make_acts(layers=(5,))[5], make_tokens()
        )
        change(folder)
        return folder

    return write


def saev_case(change):
    def write(tmp_path: Path) -> Path:
        folder = write_saev(tmp_path / "in", make_acts())
        change(folder)
        return folder

    return write


def edit(path: Path, change) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def write_arrow(path: Path, table: pa.Table, options=None) -> None:
    with pa.ipc.new_stream(path, table.schema, options=options) as writer:
        writer.write_table(table)


def ragged_table(q: int) -> pa.Table:
    rows = [[[0.0] * SHAPE[2]] * (SHAPE[1] - (i == 1)) for i in range(q)]
    return pa.table({"blocks.5.hook_resid_post": pa.array(rows, pa.list_(pa.list_(pa.float32())))})


def missing_table(q: int) -> pa.Table:
    rows = [None if i == 1 else [[0.0] * SHAPE[2]] * SHAPE[1] for i in range(q)]
    return pa.table({"blocks.5.hook_resid_post": pa.array(rows, pa.list_(pa.list_(pa.float32())))})


LZ4 = pa.ipc.IpcWriteOptions(compression="lz4")
FIRST = "data-00000-of-00003.arrow"

WRONG = {
    "npy cut short": (npy_case(lambda f: spoil(f / "layer_11.npy", lambda b: b[:-7])), CorpusError, r"layer_11\.npy"),
    "npy too long": (npy_case(lambda f: spoil(f / "layer_3.npy", lambda b: b + b"x")), CorpusError, r"layer_3\.npy holds"),
    "npy empty": (npy_case(lambda f: spoil(f / "layer_3.npy", lambda b: b"")), CorpusError, r"layer_3\.npy cannot"),
    "npy not npy": (npy_case(lambda f: spoil(f / "layer_3.npy", lambda b: b"PK" + b)), CorpusError, r"layer_3\.npy cannot"),
    "npy pickled": (
        npy_case(lambda f: np.save(f / "layer_3.npy", np.array([{}]), allow_pickle=True)),
        CorpusError,
        r"layer_3\.npy cannot",
    ),
    "npy one number": (npy_case(lambda f: np.save(f / "layer_3.npy", np.float32(1))), CorpusError, r"layer_3\.npy has shape \[\]"),
    "npy flat": (npy_case(lambda f: np.save(f / "layer_3.npy", np.ones(9, "f4"))), CorpusError, r"layer_3\.npy has shape \[9\]"),
    "npy of other shape": (
        npy_case(lambda f: np.save(f / "layer_3.npy", np.ones((13, 6, 5), "f4"))),
        CorpusError,
        r"layer_\d+\.npy has shape .* but layer_\d+\.npy",
    ),
    "npy of other dtype": (
        npy_case(lambda f: np.save(f / "layer_3.npy", np.ones(SHAPE, "f2"))),
        CorpusError,
        r"layer_\d+\.npy has dtype float\d\d, but layer_\d+\.npy has float\d\d",
    ),
    "npy of integers": (
        npy_case(lambda f: np.save(f / "layer_3.npy", np.ones(SHAPE, "i4"))),
        CorpusError,
        r"layer_3\.npy holds <i4 \(int32\); expected",
    ),
    "npy big-endian": (
        npy_case(lambda f: np.save(f / "layer_3.npy", np.ones(SHAPE, ">f4"))),
        CorpusError,
        r"layer_3\.npy holds >f4",
    ),
    "npy Fortran": (
        npy_case(lambda f: np.save(f / "layer_3.npy", np.asfortranarray(np.ones(SHAPE, "f4")))),
        CorpusError,
        r"layer_3\.npy is in Fortran order",
    ),
    "npy empty axis": (
        npy_case(lambda f: [np.save(f / f"layer_{n}.npy", np.ones((13, 6, 0), "f4")) for n in LAYERS]),
        CorpusError,
        r"layer_\d+\.npy|in holds no activations",
    ),
    "npy twice one layer": (
        npy_case(lambda f: np.save(f / "layer-3.npy", np.ones(SHAPE, "f4"))),
        CorpusError,
        r"layer-3\.npy and layer_3\.npy are both layer 3",
    ),
    "npy nameless": (
        npy_case(lambda f: np.save(f / "mean.npy", np.ones(SHAPE, "f4"))),
        UsageError,
        r"no layer number in mean\.npy",
    ),
    "npy tokens of other shape": (
        npy_case(lambda f: np.save(f / "tokens.npy", np.ones((13, 5), "i8"))),
        CorpusError,
        r"tokens\.npy is int64 \[13, 5\]; expected integers \[13, 6\]",
    ),
    "npy document of other shape": (
        npy_case(lambda f: np.save(f / "document.npy", np.ones((13, 6), "i8"))),
        CorpusError,
        r"document\.npy is int64 \[13, 6\]; expected one integer",
    ),
    "safetensors cut short": (
        safetensors_case(lambda f: spoil(f / "11.safetensors", lambda b: b[:-1])),
        CorpusError,
        r"11\.safetensors cannot be read",
    ),
    "safetensors empty": (safetensors_case(lambda f: spoil(f / "3.safetensors", lambda b: b"")), CorpusError, r"3\.safetensors"),
    "safetensors of other width": (
        safetensors_case(lambda f: write_safetensors(f / "3.safetensors", {3: np.ones((13, 6, 5), "f4")})),
        CorpusError,
        r"safetensors has shape \[position, width\] \(6, \d\), but .*safetensors",
    ),
    "safetensors of other length": (
        safetensors_case(lambda f: write_safetensors(f / "3.safetensors", {3: np.ones((12, 6, 4), "f4")})),
        CorpusError,
        r"in: layer_\d+ has sequences 1\d, but",
    ),
    "safetensors of integers": (
        safetensors_case(lambda f: write_safetensors(f / "3.safetensors", {3: np.ones(SHAPE, "i4")})),
        CorpusError,
        r"3\.safetensors: layer_3 is I32",
    ),
    "safetensors tokens of other shape": (
        safetensors_case(
            lambda f: write_safetensors(f / "t.safetensors", {}, tokens=np.ones((13, 5), np.int64))
        ),
        CorpusError,
        r"t\.safetensors: tokens is I64 \[13, 5\]",
    ),
    "safetensors fewer tokens": (
        safetensors_case(
            lambda f: write_safetensors(f / "t.safetensors", {}, tokens=np.ones((12, 6), np.int64))
        ),
        CorpusError,
        r"tokens has sequences 12, but",
    ),
    "saelens cut short": (
        saelens_case(lambda f: spoil(f / FIRST, lambda b: b[:-100])),
        CorpusError,
        rf"{FIRST} is cut short",
    ),
    "saelens damaged": (
        saelens_case(lambda f: spoil(f / FIRST, lambda b: b"\0" * 64 + b[64:])),
        CorpusError,
        FIRST,
    ),
    "saelens empty": (saelens_case(lambda f: spoil(f / FIRST, lambda b: b"")), CorpusError, FIRST),
    "saelens missing data": (saelens_case(lambda f: (f / FIRST).unlink()), NotFoundError, rf"{FIRST} is missing"),
    "saelens missing state": (
        saelens_case(lambda f: (f / "state.json").unlink()),
        NotFoundError,
        r"state\.json is missing",
    ),
    "saelens missing info": (
        saelens_case(lambda f: (f / "dataset_info.json").unlink()),
        NotFoundError,
        r"dataset_info\.json is missing",
    ),
    "saelens interrupted": (saelens_case(lambda f: (f / ".tmp_shards").mkdir()), CorpusError, "interrupted"),
    "saelens not JSON": (saelens_case(lambda f: (f / "state.json").write_text("{")), CorpusError, r"state\.json is not JSON"),
    "saelens file elsewhere": (
        saelens_case(lambda f: edit(f / "state.json", lambda s: s.update(_data_files=[{"filename": "../x.arrow"}]))),
        CorpusError,
        r"state\.json names the data files",
    ),
    "saelens says another shape": (
        saelens_case(
            lambda f: edit(f / "dataset_info.json", lambda s: s["features"]["blocks.5.hook_resid_post"].update(shape=[6, 5]))
        ),
        CorpusError,
        rf"{FIRST}: blocks\.5\.hook_resid_post has lengths from 4 to 5",
    ),
    "saelens ragged": (saelens_case(lambda f: write_arrow(f / FIRST, ragged_table(5))), CorpusError, rf"{FIRST}.*lengths from 5 to 6"),
    "saelens missing sequence": (
        saelens_case(lambda f: write_arrow(f / FIRST, missing_table(5))),
        CorpusError,
        rf"{FIRST}.*missing sequences",
    ),
    "saelens without the column": (
        saelens_case(lambda f: write_arrow(f / FIRST, pa.table({"text": ["a"]}))),
        CorpusError,
        rf"{FIRST} has no column blocks\.5",
    ),
    "saelens of several dtypes": (
        saelens_case(
            lambda f: write_arrow(f / FIRST, arrow_table("blocks.5.hook_resid_post", np.ones(SHAPE, "f2"), make_tokens()))
        ),
        CorpusError,
        rf"00001-of-00003\.arrow has dtype float32, but .*{FIRST} has float16",
    ),
    "saelens with fewer tokens": (
        saelens_case(
            lambda f: write_arrow(f / FIRST, arrow_table("blocks.5.hook_resid_post", make_acts(layers=(5,))[5][:5], None))
        ),
        CorpusError,
        "token_ids has sequences 8, but",
    ),
    "saelens compressed": (
        saelens_case(
            lambda f: write_arrow(
                f / FIRST, arrow_table("blocks.5.hook_resid_post", np.ones(SHAPE, "f4"), make_tokens()), LZ4
            )
        ),
        CorpusError,
        rf"{FIRST} is compressed",
    ),
    "saelens of no array": (
        saelens_case(lambda f: edit(f / "dataset_info.json", lambda s: s.update(features={}))),
        NotFoundError,
        "in holds no activations",
    ),
    "saev cut short": (
        saev_case(lambda f: spoil(f / "acts000001.bin", lambda b: b[:-4])),
        CorpusError,
        r"acts000001\.bin has 956 bytes",
    ),
    "saev last cut short": (
        saev_case(lambda f: spoil(f / "acts000002.bin", lambda b: b[:600])),
        CorpusError,
        r"acts000002\.bin has 600 bytes",
    ),
    "saev missing shard": (
        saev_case(lambda f: (f / "acts000001.bin").unlink()),
        NotFoundError,
        r"acts000001\.bin is missing",
    ),
    "saev missing list": (saev_case(lambda f: (f / "shards.json").unlink()), NotFoundError, r"shards\.json is missing"),
    "saev interrupted": (
        saev_case(lambda f: edit(f / "shards.json", lambda s: s.pop())),
        CorpusError,
        r"shards\.json counts 10 examples and .*metadata\.json 13: recording was interrupted",
    ),
    "saev later protocol": (
        saev_case(lambda f: edit(f / "metadata.json", lambda m: m.update(protocol="3.0"))),
        CorpusError,
        r"metadata\.json: protocol '3\.0' is not supported",
    ),
    "saev other dtype": (
        saev_case(lambda f: edit(f / "metadata.json", lambda m: m.update(dtype="float16"))),
        CorpusError,
        r"metadata\.json: dtype 'float16'",
    ),
    "saev without width": (
        saev_case(lambda f: edit(f / "metadata.json", lambda m: m.pop("d_model"))),
        CorpusError,
        r"metadata\.json has no int named d_model or d_vit",
    ),
    "saev strange list": (
        saev_case(lambda f: (f / "shards.json").write_text('[{"name": "a"}]')),
        CorpusError,
        r"shards\.json is not a list of shards",
    ),
    "saev shard elsewhere": (
        saev_case(lambda f: edit(f / "shards.json", lambda s: s[0].update(name="../acts000000.bin"))),
        CorpusError,
        r"shards\.json has a shard",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_named(tmp_path, case):
    write, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        open_source(write(tmp_path))


def test_what_cannot_be_told_is_asked_for(tmp_path):
    with pytest.raises(NotFoundError, match="no activations at"):
        open_source(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds nothing that is known"):
        open_source(tmp_path / "empty")
    with pytest.raises(NotFoundError, match=r"layer_3\.npy"):
        open_source(tmp_path / "empty", source_format="npy")
    folder = write_npy(tmp_path / "both", make_acts())
    write_safetensors(folder / "3.safetensors", make_acts())
    with pytest.raises(UsageError, match=r"looks like npy and safetensors.*--format"):
        open_source(folder)
    assert open_source(folder, source_format="npy").facts.format == "npy"
    with pytest.raises(UsageError, match="expected one of npy, safetensors, saelens, saev"):
        open_source(folder, source_format="csv")
    with pytest.raises(UsageError, match="--bfloat16-bits"):
        open_source(folder, source_format="safetensors", bfloat16_bits=True)
    with pytest.raises(UsageError, match=r"has no layer_4\.npy; it has layer_3\.npy, layer_11\.npy"):
        open_source(folder, source_format="npy", layer_of={"layer_4.npy": 4})
    assert set(formats.FORMATS) == {"npy", "safetensors", "saelens", "saev"}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layer_3.npy", 3),
        ("7.npy", 7),
        ("12", 12),
        ("blocks.10.hook_resid_post", 10),
        ("model.layers.31", 31),
        ("transformer.h.2", 2),
        ("Layer-04", 4),
        ("mean", None),
        ("width3", None),
        ("depth.3", None),
        ("layers.3.blocks.4", None),
    ],
)
def test_layer_in_a_name(name, layer):
    assert layer_in(name) == layer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (3, 4)}, r"layers \[3, 4\]: expected distinct layers among \[3, 11\]"),
        ({"exclude_first": 6}, "exclude_first=6: expected 0 to 5"),
        ({"special_ids": (1,)}, "holds no tokens"),
        ({"dtype": "int8"}, "dtype='int8': expected one of"),
        ({"codec": "gzip"}, "codec='gzip': expected one of"),
        ({"holdout_frac": 1.0}, "holdout_frac=1.0"),
        ({"sequences_per_shard": 0}, "sequences_per_shard=0"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, changes, message):
    folder = write_npy(tmp_path / "in", make_acts())
    with pytest.raises(UsageError, match=message):
        import_activations(open_source(folder), settings(tmp_path / "s.zarr", **changes))
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize("bad", [-1, 2**32])
def test_token_ids_out_of_range(tmp_path, bad):
    folder, tokens = write_npy(tmp_path / "in", make_acts()), make_tokens()
    tokens[9, 2] = bad
    np.save(folder / "tokens.npy", tokens)
    with pytest.raises(CorpusError, match=rf"tokens\.npy: sequence 9 holds token id {bad}"):
        import_activations(open_source(folder), settings(tmp_path / "s.zarr"))


# NaN, infinity, and a disk too small.


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity")])
@pytest.mark.parametrize("position", [0, 4])  # the first is stored too, though never trained on
def test_a_number_that_is_none_is_located(tmp_path, value, word, position):
    acts = make_acts()
    acts[11][9, position, 2] = value
    folder, out = write_npy(tmp_path / "in", acts), tmp_path / "s.zarr"
    with pytest.raises(
        NonFiniteError, match=rf"{word} in layer 11, sequence 9, position {position} of .*layer_11\.npy"
    ):
        import_activations(open_source(folder), settings(out))
    assert not actcache.open(out).is_complete
    import_activations(open_source(folder), settings(tmp_path / "without.zarr", layers=(3,)))


def test_infinite_by_conversion_is_said_so(tmp_path):
    acts = make_acts()
    acts[3][2, 1, 0] = 1e6
    folder = write_npy(tmp_path / "in", acts)
    with pytest.raises(
        NonFiniteError, match=r"layer 3, sequence 2, position 1 of .*layer_3\.npy holds 1e\+06.*as float16"
    ):
        import_activations(open_source(folder), settings(tmp_path / "s.zarr", dtype="float16"))


def test_disk_forecast(tmp_path, monkeypatch):
    folder, said = write_npy(tmp_path / "in", make_acts()), []
    reporter = ImportReporter(on_forecast=lambda grid, size: said.append((grid, size)))
    import_activations(open_source(folder), settings(tmp_path / "s.zarr"), reporter=reporter)
    ((grid, size),) = said
    assert (grid.n_shards, size.raw_bytes) == (4, 14 * 6 * 2 * 4 * 4)
    monkeypatch.setattr("actcache.producer.plan.free_bytes", lambda _path: 1000)
    with pytest.raises(DiskFullError, match="Nothing was written"):
        import_activations(open_source(folder), settings(tmp_path / "other.zarr"))
    assert not (tmp_path / "other.zarr").exists()


# Continuing, and refusing to.


class Died(BaseException):
    """What a killed process does: nothing more."""


def dying_at(n: int):
    """Let n operations on the disk pass; from then on every one is the death of the process."""
    count = 0

    def on_operation(operation: str, key: str) -> None:
        nonlocal count
        count += 1
        if count > n:
            raise Died(operation, key)

    return on_operation


def test_killed_anywhere_it_continues_to_the_same_store(tmp_path):
    folder = write_npy(tmp_path / "in", make_acts())
    np.save(folder / "tokens.npy", make_tokens())
    operations = []
    import_activations(
        open_source(folder), settings(tmp_path / "whole.zarr"), on_operation=lambda *o: operations.append(o)
    )
    whole = all_files(tmp_path / "whole.zarr")
    for n in [*range(0, len(operations), 9), len(operations) - 1]:
        out = tmp_path / f"{n}.zarr"
        with pytest.raises(Died):
            import_activations(open_source(folder), settings(out), on_operation=dying_at(n))
        if (out / "zarr.json").exists():  # what is committed is readable as it is
            store = actcache.open(out)
            assert set(store.committed()) <= set(range(store.plan.grid.n_shards))
        import_activations(open_source(folder), settings(out))
        assert all_files(out) == whole, n
        assert not list(tmp_path.glob("*.planning-*"))


def test_rows_left_without_a_commit_are_adopted(tmp_path):
    acts = make_acts()
    folder, out = write_npy(tmp_path / "in", acts), tmp_path / "s.zarr"

    def no_ledger(operation: str, key: str) -> None:
        if "/ledger/c." in key:
            raise Died(key)

    with pytest.raises(Died):
        import_activations(open_source(folder), settings(out), on_operation=no_ledger)
    summary = import_activations(open_source(folder), settings(out))
    assert summary.n_adopted >= 1
    assert summary.n_adopted + summary.n_imported == 4
    check_store(out, acts)


def test_a_finished_store_is_left_alone(tmp_path):
    folder, out = write_npy(tmp_path / "in", make_acts()), tmp_path / "s.zarr"
    import_activations(open_source(folder), settings(out))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert import_activations(open_source(folder), settings(out)).was_complete
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"codec": "lz4"}, "capture resid_post.codec is 'zstd' there and 'lz4' here"),
        ({"dtype": "bfloat16"}, "capture resid_post.dtype is 'float32' there"),
        ({"layers": (3,)}, r"capture resid_post.layers is \[3, 11\] there"),
        ({"exclude_first": 0}, "exclude_first is 1 there and 0 here"),
        ({"holdout_frac": 0.5}, "holdout_frac is 0.25 there"),
        ({"sequences_per_shard": 5}, "sequences_per_shard is 4 there"),
        ({"model_name": "gpt2"}, "model.name is 'unknown' there and 'gpt2' here"),
    ],
)
def test_other_arguments_are_refused_by_name(tmp_path, changes, names):
    folder, out = write_npy(tmp_path / "in", make_acts()), tmp_path / "s.zarr"
    import_activations(open_source(folder), settings(out))
    with pytest.raises(PlanMismatchError, match=names):
        import_activations(open_source(folder), settings(out, **changes))


def test_another_source_is_refused(tmp_path):
    acts, out = make_acts(), tmp_path / "s.zarr"
    folder = write_npy(tmp_path / "in", acts)
    import_activations(open_source(folder), settings(out))
    swapped = {"layer_3.npy": 11, "layer_11.npy": 3}
    with pytest.raises(PlanMismatchError, match="which layer"):
        import_activations(open_source(folder, layer_of=swapped), settings(out))
    with pytest.raises(PlanMismatchError, match="mlp_out"):
        import_activations(open_source(folder, hook="mlp_out"), settings(out))
    np.save(folder / "tokens.npy", make_tokens())
    with pytest.raises(PlanMismatchError, match=r"corpus\.sources\.files"):
        import_activations(open_source(folder), settings(out))
    (folder / "tokens.npy").unlink()
    acts[3][12, 5, 3] += 1
    np.save(folder / "layer_3.npy", acts[3])
    with pytest.raises(PlanMismatchError, match="same names and sizes, but their bytes"):
        import_activations(open_source(folder), settings(out))


def test_a_moved_source_is_the_same(tmp_path):
    folder, out = write_npy(tmp_path / "in", make_acts()), tmp_path / "s.zarr"
    import_activations(open_source(folder), settings(out))
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere" / "in")
    assert import_activations(open_source(moved), settings(out)).was_complete


def test_a_source_that_changes_meanwhile_is_refused(tmp_path):
    acts = make_acts()
    folder, out = write_npy(tmp_path / "in", acts), tmp_path / "s.zarr"

    def change(operation: str, key: str) -> None:
        if "/ledger/c.0.0" in key and operation == "open":
            np.save(folder / "layer_3.npy", acts[3] + 1)

    with pytest.raises(CorpusError, match=r"layer_3\.npy changed while it was imported"):
        import_activations(open_source(folder), settings(out), on_operation=change)


def test_a_source_that_shrinks_meanwhile_is_an_error(tmp_path):
    folder = write_npy(tmp_path / "in", make_acts())
    source = open_source(folder)
    spoil(folder / "layer_3.npy", lambda b: b[:-64])
    with pytest.raises(CorpusError, match=r"layer_3\.npy ends at byte .* cut short while it was imported"):
        source.read(3, np.arange(13))
    (folder / "layer_3.npy").unlink()
    with pytest.raises(NotFoundError, match=r"layer_3\.npy went away"):
        source.read(3, np.arange(13))


def test_a_folder_in_the_way_is_not_touched(tmp_path):
    folder = write_npy(tmp_path / "in", make_acts())
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr" / "mine").touch()
    with pytest.raises(UsageError, match="exists and is not a store"):
        import_activations(open_source(folder), settings(tmp_path / "s.zarr"))
    assert [path.name for path in (tmp_path / "s.zarr").iterdir()] == ["mine"]


# Memory.


@dataclass
class CountingSource:
    """Numbers made up when they are read; remembers how much was asked for at once."""

    facts: Facts
    reads: list[int]

    def read(self, layer: int, sequences: np.ndarray) -> np.ndarray:
        assert (np.diff(sequences) > 0).all()
        self.reads.append(len(sequences))
        f = self.facts
        values = (sequences[:, None] * f.seq_len + np.arange(f.seq_len) + layer).astype(np.float32)
        return np.repeat(values[..., None], f.width, 2)

    def tokens(self, sequences: np.ndarray) -> np.ndarray:
        raise AssertionError("has none")

    def locate(self, layer: int, sequence: int) -> str:
        return "nowhere"


def test_memory_is_bounded_by_shards_and_reads(tmp_path, monkeypatch):
    """32 MiB pass through; two shards of 256 KiB, a read of 64 KiB and the encoder's chunks are what is held."""
    (tmp_path / "file").write_bytes(b"x")
    facts = Facts(
        format="npy",
        name="made up",
        files=(SourceFile(name="file", path=tmp_path / "file"),),
        hook="resid_post",
        layers=(0, 1),
        n_sequences=4096,
        seq_len=16,
        width=64,
        dtype="float32",
        has_tokens=False,
        document=None,
        exclude_first=0,
        model=None,
        family=None,
        layout={},
    )
    source = CountingSource(facts, [])
    monkeypatch.setattr(run, "READ_BYTES", 1 << 16)
    chosen = settings(tmp_path / "s.zarr", sequences_per_shard=32, rows_per_chunk=64, codec="lz4")
    small = replace(facts, n_sequences=64)
    import_activations(CountingSource(small, []), replace(chosen, out=tmp_path / "warm.zarr"))
    tracemalloc.start()
    try:
        import_activations(source, chosen)
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert max(source.reads) * facts.n_bytes_per_sequence <= 1 << 16
    assert sum(source.reads) == 2 * 4096
    assert peak < 3 << 19, f"{peak:,} bytes"
    store = actcache.open(tmp_path / "s.zarr")
    rows = store.read(layer=1, sequences=slice(0, 40)).numpy()
    expected = store.document[:40].astype(np.float32) * 16 + np.arange(16) + 1
    assert np.array_equal(rows, np.repeat(expected[..., None], 64, 2))


def test_tokens_are_scanned_in_parts(tmp_path, monkeypatch):
    folder = write_npy(tmp_path / "in", make_acts())
    np.save(folder / "tokens.npy", make_tokens())
    source, asked = open_source(folder), []
    tokens = source.tokens
    monkeypatch.setattr(source, "tokens", lambda s: (asked.append(len(s)), tokens(s))[1])
    monkeypatch.setattr(layout, "TOKENS_AT_A_TIME", 12)
    import_activations(source, settings(tmp_path / "s.zarr"))
    assert max(asked) == 4  # a shard's, for the plan
    assert asked[:7] == [2] * 6 + [1]
