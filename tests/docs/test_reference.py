"""The reference pages against what they describe."""

import inspect

import numpy as np
import pytest

from actcache import errors
from actcache.flow import Batch, BatchSource
from actcache.reader.access import Store
from actcache.store import keyed
from tests.docs import cli_reference
from tests.docs.pages import DOCS, ROOT, blocks, sections, tables, unquoted
from trainer.config import TrainConfig

REFERENCE = DOCS / "reference"


def read(name: str) -> str:
    return (REFERENCE / name).read_text(encoding="utf-8")


def test_cli_page_is_current():
    assert read("cli.md") == cli_reference.page(), "run: python -m tests.docs.cli_reference"


def test_cli_page_has_the_flags():
    text = read("cli.md")
    assert "`--json`" in text
    assert "`--as-json`" not in text
    assert "| `STORE` |" in text


def test_error_page_is_the_tree():
    (table,) = tables(read("errors.md"))
    classes = [
        c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.ActcacheError)
    ]
    expected = []
    for c in classes:
        base = c.__bases__[-1]
        expected.append((c.__name__, c.kind, base.__name__, (c.__doc__ or "").strip()))
    assert [
        (unquoted(r["class"]), unquoted(r["kind"]), unquoted(r["also a"]), r["meaning"]) for r in table
    ] == expected
    for c in classes[1:]:
        assert f"{c.__name__} " in (errors.__doc__ or "")


def public_members(c: type) -> set[str]:
    return {name for name in vars(c) if not name.startswith("_")}


def named(table: list[dict[str, str]]) -> list[str]:
    return [unquoted(row["member"]).split("(")[0] for row in table]


def test_python_page_names_every_member():
    found = sections(read("python.md"), 2)
    (store,) = tables(found["Store"])
    assert set(named(store)) == public_members(Store)
    (batch,) = tables(found["Batch"])
    assert set(named(batch)) == public_members(Batch)
    (source,) = tables(found["BatchSource"])
    assert set(named(source)) == public_members(BatchSource) | {"__iter__"}


def test_python_page_has_the_arguments_of_stream():
    (table,) = tables(sections(read("python.md"), 2)["Store.stream"])
    parameters = list(inspect.signature(Store.stream).parameters.values())[1:]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters)
    expected = [(p.name, repr(p.default).replace("'", '"')) for p in parameters]
    assert [(unquoted(r["argument"]), r["default"]) for r in table] == expected


def test_methods_of_store_take_what_the_page_says():
    for name in ("stats", "read"):
        said = next(r for r in tables(read("python.md"))[0] if r["member"].startswith(f"`{name}("))
        arguments = unquoted(said["member"]).partition("(")[2].rstrip(")").split(", ")
        assert arguments == list(inspect.signature(getattr(Store, name)).parameters)[1:]


def test_training_page_has_every_setting_and_its_default():
    (table,) = tables(sections(read("training.md"), 2)["Settings"])
    expected = [
        (name, repr(field.default).replace("'", '"')) for name, field in TrainConfig.model_fields.items()
    ]
    assert [(unquoted(r["field"]), r["default"]) for r in table] == expected


def test_training_page_has_every_score():
    from analysis.metrics import LayerScores

    (table,) = tables(sections(read("training.md"), 2)["Metrics"])
    assert [unquoted(r["score"]) for r in table] == list(LayerScores._fields)


@pytest.mark.parametrize("n", [1, 2, 3, 100, 1025])
def test_feistel_of_the_order_page_is_ours(n):
    names: dict = {}
    (code,) = [b for b in blocks(DOCS / "explanation" / "order.md") if b.language == "python"]
    exec(compile(code.text, "order.md", "exec"), names)
    key = keyed.derive(5, "global", 2)
    assert [names["feistel"](key, i, n) for i in range(n)] == keyed.feistel(key, np.arange(n), n).tolist()


def test_changelog_has_a_format_heading_for_every_release():
    releases = sections((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), 2)
    assert releases
    for text in releases.values():
        assert "### Format" in text


def test_service_page_has_the_wire_format():
    from actcache.service.server import ACTIONS
    from actcache.service.wire import WindowTicket, schema_of

    rows = sections(read("service.md"), 2)
    ticket, columns = tables(rows["Rows"])
    fields = {unquoted(r["field"]): unquoted(r["default"]) for r in ticket}
    assert list(fields) == list(WindowTicket.model_fields)
    for name, field in WindowTicket.model_fields.items():
        assert fields[name] == ("required" if field.is_required() else str(field.default)), name
    schema = schema_of([("a", 8, "float32")])
    assert [unquoted(r["column"]) for r in columns[:3]] == schema.names[:3]
    assert [unquoted(r["type"]) for r in columns[:3]] == [str(t) for t in schema.types[:3]]
    (actions,) = tables(rows["Actions"])
    assert {unquoted(r["action"]): r["what"] for r in actions} == ACTIONS
