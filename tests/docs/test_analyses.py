"""The pages on analyses and latents against the code, and against the tests they name."""

import importlib.util
import re

import pyarrow as pa

from analysis.latents import SCHEMA
from analysis.loss import LossScores
from tests.docs.cli_reference import all_commands
from tests.docs.pages import DOCS, ROOT, sections, tables, unquoted

REFERENCE = DOCS / "reference"


def section(page: str, title: str) -> str:
    return sections((REFERENCE / page).read_text(encoding="utf-8"), 2)[title]


def test_the_map_names_every_row_once_or_more_but_those_of_the_web_application():
    (table,) = tables(section("analyses.md", "Map"))
    assert sorted({int(row["#"]) for row in table}) == [n for n in range(1, 32) if n not in (26, 27)]


def test_commands_modules_and_tests_of_the_map_are_there():
    import cli

    commands = {f"actcache {name}" for name, _function in all_commands(cli.app)}
    (table,) = tables(section("analyses.md", "Map"))
    for row in table:
        assert unquoted(row["command"]) in commands
        assert importlib.util.find_spec(unquoted(row["module"])), row["module"]
        path, name = unquoted(row["test"]).split("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", text, re.MULTILINE), row["test"]


def test_the_loss_table_is_the_scores():
    (table,) = tables(section("analyses.md", "Loss"))
    named = {name for row in table for name in re.findall(r"`(\w+)`", row["score"])}
    assert named | {"n_tokens", "n_sequences"} == set(LossScores.__dataclass_fields__)


ARROW = {"uint32": pa.uint32(), "uint16": pa.uint16(), "bool": pa.bool_()}


def test_columns_of_latents_are_the_schema():
    (table,) = tables(section("latents.md", "shard-*.parquet"))
    assert [unquoted(row["column"]) for row in table] == SCHEMA.names
    for row, field in zip(table, SCHEMA, strict=True):
        expected = row["type"]
        if expected.startswith("list of "):
            assert str(field.type.value_type).replace("float", "float32") == expected.removeprefix("list of ")
        else:
            assert field.type == ARROW[expected]
