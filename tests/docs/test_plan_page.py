"""docs/reference/plan.md against the options of build and the records of a plan."""

import inspect
import typing

import typer

import cli
from actcache.store.schema import Capture, Request, SourceRecord
from tests.docs.pages import DOCS, tables, unquoted


def rows():
    (table,) = tables((DOCS / "reference" / "plan.md").read_text(encoding="utf-8"))
    return {unquoted(row["option"]): row for row in table}


def options() -> set[str]:
    hints = typing.get_type_hints(cli.build, include_extras=True)
    names = [n for n in inspect.signature(cli.build).parameters if hints[n] is not typer.Context]
    return {f"--{name.replace('_', '-')}".replace("--as-json", "--json") for name in names}


def test_every_option_of_build_is_on_the_page():
    assert set(rows()) == options()


def test_every_field_is_one():
    """A path such as request.corpus.sources.column names fields that exist; every field of the request is named."""
    named = set()
    for option, row in rows().items():
        field = row["field of the plan"].split("`")[1] if "`" in row["field of the plan"] else ""
        kind = row["belongs to"]
        assert (kind == "run") == (not field), option
        if kind == "capture":
            assert field in Capture.model_fields, option
        elif kind == "plan":
            first, name, *rest = field.split(".")
            assert first == "request"
            assert name in Request.model_fields, option
            named.add(name)
            if name == "corpus":
                assert rest[0] == "sources"
                assert not rest[1:] or rest[1] in SourceRecord.model_fields, option
    by_hand = {"layout", "rows_per_chunk"}  # what no option changes
    assert named | by_hand | {"tokenizer"} == set(Request.model_fields)


def test_options_that_go_with_add_are_those_of_a_run_or_a_capture():
    of_plan = {name for name, row in rows().items() if row["belongs to"] == "plan"}
    allowed = {f"--{name.replace('_', '-')}".replace("--as-json", "--json") for name in cli._OF_THE_RUN}
    assert {name for name, row in rows().items() if row["belongs to"] != "plan"} <= allowed
    assert of_plan & allowed == {"--model", "--revision", "--model-dtype", "--device", "--shard-memory"}
