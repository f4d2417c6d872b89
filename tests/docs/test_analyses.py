"""The pages on analyses and latents against the code, and against the tests they name."""

import importlib.util
import json
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


def test_the_paragraph_on_the_demo_says_what_was_measured():
    """Numbers of benchmarks/results/analyze.json, which holds the summary of the demo's analysis."""
    text = (REFERENCE / "analyses.md").read_text(encoding="utf-8")
    paragraph = text.split("<!-- demo-analysis:begin -->")[1].split("<!-- demo-analysis:end -->")[0]
    paragraph = " ".join(paragraph.split())
    measured = json.loads((ROOT / "benchmarks" / "results" / "analyze.json").read_text(encoding="utf-8"))
    summary = measured["demo"]["summary"]
    scores, facts = summary["scores"], summary["facts"]
    for name, form in {
        "all_layers_frac": ".1%", "n_layers_active": ".2f", "one_layer_per_prompt_frac": ".1%", "one_layer_per_token_frac": ".1%",
        "rel_t_mass": ".3f", "rel_t_latent": ".3f", "rel_f_mass": ".3f", "rel_f_latent": ".3f", "neighbour_cosine": ".3f", "fvu": ".3f",
        "fvu_scalar": ".3f", "loss_tokens": ",", "loss_change": ".3f", "loss_recovered_zero": ".3f", "loss_change_together": ".3f",
        "loss_recovered_zero_together": ".3f",
    }.items():  # fmt: skip
        said = format(scores[name], form).replace("%", " %")
        assert re.search(rf"(?<![\d.]){re.escape(said)}(?![\d])", paragraph), (name, said)
    for name in ("mass", "latent"):
        assert f"{1 / scores[f'rel_t_{name}']:.1f} times" in paragraph
    assert f"{facts['n_latents']:,}" in paragraph
    assert f"{facts['n_tokens']:,} held-out" in paragraph


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
