"""A page of text, tables and pictures in one file: light and dark, phone and print, nothing from elsewhere."""

import html
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.tables import Table, said

_STYLE = """
:root{color-scheme:light dark;--back:#fdfdfc;--ink:#1c1f23;--soft:#5b626b;--rule:#c9ced4;--card:#f4f5f6;--mark:59,130,196}
@media (prefers-color-scheme:dark){:root{--back:#15181c;--ink:#e6e8ea;--soft:#9aa3ad;--rule:#454c54;--card:#1e2227}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .3rem}h2{font-size:1.2rem;margin:2.6rem 0 .6rem;padding-top:.8rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.6rem 0 .4rem}p{margin:.5rem 0}.soft,figcaption,.note{color:var(--soft);font-size:.86rem}
nav{margin:1rem 0;font-size:.9rem}nav a{margin-right:1rem;white-space:nowrap}a{color:inherit}
figure{margin:1.2rem 0;break-inside:avoid}.drawing{overflow-x:auto}figure svg{display:block;width:100%;height:auto;max-width:52rem}
@media (max-width:40rem){.drawing>svg{min-width:33rem}.grid .drawing>svg{min-width:0}}
@media (prefers-color-scheme:dark){figure svg image{filter:brightness(1.6)}}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:1rem}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:1rem 0}
.facts div{background:var(--card);border-radius:6px;padding:.55rem .7rem}.facts b{display:block;font-size:1.15rem;font-variant-numeric:tabular-nums}
.facts span{color:var(--soft);font-size:.8rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.84rem;font-variant-numeric:tabular-nums;margin:.5rem 0}
th,td{padding:.22rem .6rem;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th{color:var(--soft);font-weight:600;cursor:pointer;user-select:none;white-space:normal;vertical-align:bottom;line-height:1.25}th[aria-sort=ascending]::after{content:" \\25b4"}th[aria-sort=descending]::after{content:" \\25be"}
td.text,th.text{text-align:left}td.wide{white-space:normal;min-width:16rem}
.example{font:.82rem/1.7 ui-monospace,monospace;margin:.15rem 0;overflow-wrap:anywhere;white-space:pre-wrap}
.example mark{color:inherit;background:rgba(var(--mark),var(--a));border-radius:2px}.example u{text-decoration-thickness:2px}
details{margin:.6rem 0}summary{cursor:pointer}code{font-size:.9em}
@media print{:root{--back:#fff;--ink:#000;--soft:#444;--rule:#bbb;--card:#f3f3f3}body{font-size:10pt}main{max-width:none;padding:0}nav{display:none}
h2{break-after:avoid}details:not([open])>*:not(summary){display:none}.scroll,.drawing{overflow:visible}.drawing>svg{min-width:0}
figure svg image{filter:none}tr,p{break-inside:avoid}table{font-size:6.5pt}th,td{padding:.1rem .22rem}}
"""

_SCRIPT = """
for (const th of document.querySelectorAll("th")) th.addEventListener("click", () => {
  const table = th.closest("table"), body = table.tBodies[0], i = th.cellIndex;
  const down = th.getAttribute("aria-sort") !== "descending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => row.cells[i].dataset.value ?? row.cells[i].textContent;
  const rows = [...body.rows].sort((a, b) => {
    const x = key(a), y = key(b), order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return down ? -order : order;
  });
  body.append(...rows);
});
"""


def escape(text: object) -> str:
    """Text for HTML."""
    return html.escape(str(text))


def page(title: str, body: str) -> str:
    """A whole document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page that the navigation leads to."""
    return f'<section id="{name}">\n<h2>{escape(title)}</h2>\n' + "\n".join(parts) + "\n</section>"


def navigation(body: str) -> str:
    """Links to the sections of a page."""
    found = re.findall(r'<section id="([a-z]+)">\n<h2>(.*?)</h2>', body)
    return "<nav>" + "\n".join(f'<a href="#{name}">{title}</a>' for name, title in found) + "</nav>"


def figure(svg: str, caption: str, label: str) -> str:
    """A picture with its caption. label: what a screen reader says."""
    marked = svg.replace("<svg", f'<svg aria-label="{escape(label)}"', 1)
    return f'<figure>\n<div class="drawing">{marked}</div>\n<figcaption>{caption}</figcaption>\n</figure>'


def facts(items: Sequence[tuple[str, str]]) -> str:
    """Numbers in boxes: (what, value)."""
    boxes = "".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for what, value in items)
    return f'<div class="facts">{boxes}</div>'


def table(rows: Table, columns: Sequence[str] | None = None, *, note: bool = True) -> str:
    """A table that sorts when a heading is clicked; its note below. columns: which, in order; None: all."""
    names = list(columns or rows.columns)
    values = [rows.columns[name] for name in names]
    lists = [v.tolist() if isinstance(v, np.ndarray) else list(v) for v in values]
    is_text = [any(isinstance(v, str) for v in column) for column in lists]
    head = "".join(
        f'<th scope="col"{" class=text" * text}>{escape(name).replace("_", "_<wbr>")}</th>'
        for name, text in zip(names, is_text, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(_cell(v, text=text) for v, text in zip(row, is_text, strict=True)) + "</tr>"
        for row in zip(*lists, strict=True)
    )
    below = f'<p class="note">{escape(rows.note)}</p>' if note else ""
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{below}'
    )


def _cell(value: Any, *, text: bool) -> str:
    if text:
        return f'<td class="text">{escape(said(value))}</td>'
    known = "" if value is None or value != value else f' data-value="{value}"'
    return f"<td{known}>{escape(said(value))}</td>"


def example(pieces: Sequence[tuple[str, float]], at: int) -> str:
    """A context: (text, activation from 0 to 1) per token; the example itself is underlined."""
    out = []
    for i, (text, activation) in enumerate(pieces):
        shown = escape(text.replace("\n", "\u23ce"))
        if i == at:
            shown = f"<u>{shown}</u>"
        out.append(f'<mark style="--a:{0.6 * activation:.2f}">{shown}</mark>' if activation > 0 else shown)
    return f'<p class="example">{"".join(out)}</p>'
