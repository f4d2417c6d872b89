"""docs/reference/cli.md out of the command line's own declarations.

Run from the repository's root: python -m tests.docs.cli_reference
"""

import inspect
import types
import typing
from pathlib import Path

import typer

import cli
from tests.docs.pages import DOCS

PAGE = DOCS / "reference" / "cli.md"

HEAD = """# Command line

Made from `cli.py` by `python -m tests.docs.cli_reference`; a test holds it against `cli.py`.

`actcache --version` prints the version. `actcache --debug COMMAND ...` shows tracebacks. Progress and messages go to standard error,
results to standard output; `--json` makes the result one JSON object and leaves progress out.

Exit status: 0 done; 1 an error (its kind is printed, see [errors](errors.md)), or `verify` found or `repair` left problems; 2 an argument cannot be used;
130 stopped by Ctrl-C or SIGTERM, and can be continued.

Sizes are written `500MB` (10^6), `2GiB` (2^30) or as a number of bytes. Layers are written `all`, `0,3,5` or `0:6` (6 not included).
"""

WORDS = {str: "text", int: "integer", float: "number", bool: "flag", Path: "path"}


def kind_of(annotation) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return kind_of(next(a for a in args if a is not type(None)))
    if origin is list:
        return f"{kind_of(args[0])}, repeatable"
    return WORDS[annotation]


def name_of(name: str, declared) -> str:
    if type(declared).__name__ == "ArgumentInfo":
        return declared.metavar or name.upper()
    given = [d for d in (declared.default, *(declared.param_decls or ())) if str(d).startswith("--")]
    return given[0] if given else f"--{name.replace('_', '-')}"


def default_of(value, kind: str) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    return "" if value is None or kind == "flag" else f"`{value}`"


def all_commands(typer_app, prefix: str = "") -> list:
    """(name, function) of every command, those of groups after the others."""
    found = [(prefix + (c.name or c.callback.__name__), c.callback) for c in typer_app.registered_commands]
    for group in typer_app.registered_groups:
        found += all_commands(group.typer_instance, f"{prefix}{group.name} ")
    return found


def command_page(name: str, function) -> str:
    hints = typing.get_type_hints(function, include_extras=True)
    lines = [f"## {name}", "", inspect.getdoc(function) or "", ""]
    lines += ["| argument | kind | default | what |", "|---|---|---|---|"]
    for parameter in inspect.signature(function).parameters.values():
        if hints[parameter.name] is typer.Context:
            continue
        annotation, declared = typing.get_args(hints[parameter.name])[:2]
        kind = kind_of(annotation)
        words = (declared.help or "").replace("|", "\\|")
        lines.append(
            f"| `{name_of(parameter.name, declared)}` | {kind} | {default_of(parameter.default, kind)} | {words} |"
        )
    return "\n".join([*lines, ""])


def page() -> str:
    return "\n".join([HEAD, *(command_page(name, function) for name, function in all_commands(cli.app))])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
