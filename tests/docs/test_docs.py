"""The code in the documentation runs, links lead somewhere, and the README's map is what is on disk."""

import fnmatch
import importlib.util
import re
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import pytest

from tests.conftest import no_sync
from tests.docs.pages import DOCS, ROOT, blocks
from tests.docs.run_pages import check_words, run_page

README = ROOT / "README.md"
HOW_TO = sorted((DOCS / "how-to").glob("*.md"))
PAGES = [README, ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
OPTIONAL = {"read-with-other-tools.md": ("tensorstore", "xarray", "ml_dtypes")}


def prepare(folder: Path) -> None:
    """What a page sees of the repository."""
    (folder / "tests").mkdir(parents=True)
    (folder / "tests" / "assets").symlink_to(ROOT / "tests" / "assets")
    (folder / "examples").symlink_to(ROOT / "examples")


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory) -> Path:
    """The folder after the tutorial: acts.zarr and run."""
    folder = tmp_path_factory.mktemp("tutorial")
    prepare(folder)
    with pytest.MonkeyPatch.context() as patch, no_sync():
        patch.chdir(folder)
        assert run_page(DOCS / "tutorial.md") >= 7
    return folder


@pytest.fixture
def beside_tutorial(tutorial, tmp_path, monkeypatch) -> Path:
    """A copy of what the tutorial left, as the current folder."""
    prepare(tmp_path)
    for name in ("acts.zarr", "run"):
        shutil.copytree(tutorial / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_tutorial(tutorial):
    assert (tutorial / "run" / "sae.json").exists()


@pytest.mark.parametrize("page", HOW_TO, ids=lambda p: p.stem)
def test_how_to(page, beside_tutorial):
    for package in OPTIONAL.get(page.name, ()):
        pytest.importorskip(package)
    with no_sync(), warnings.catch_warnings():
        if page.name == "read-with-other-tools.md":  # other packages' imports are not ours to answer for
            warnings.simplefilter("ignore", DeprecationWarning)
        assert run_page(page) >= 1


@pytest.mark.parametrize("page", [p for p in PAGES if p not in HOW_TO], ids=lambda p: p.stem)
def test_other_pages(page, beside_tutorial):
    """The tutorial has run already; here its blocks are only checked for words the runner knows."""
    if page.name == "tutorial.md":
        for block in blocks(page):
            check_words(block, page)
    else:
        run_page(page)


def test_the_runner_notices_a_failing_block(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    for text, error in (
        ("```bash\nfalse\n```\n", AssertionError),
        ("```bash exit=1\ntrue\n```\n", AssertionError),
        ("```bash maybe\ntrue\n```\n", AssertionError),
        ("```sh\ntrue\n```\n", AssertionError),
        ("```bash exit=0\nactcache info nowhere.zarr\n```\n", AssertionError),
        ("```python\n1 / 0\n```\n", ZeroDivisionError),
    ):
        page.write_text(text)
        with pytest.raises(error):
            run_page(page)
    page.write_text("```bash exit=3\ntrue\nexit 3\n```\n```bash no-run\nfalse\n```\n")
    assert run_page(page) == 1


# Examples.


def test_stream_rows(beside_tutorial, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stream_rows.py", "acts.zarr"])
    runpy.run_path(str(ROOT / "examples" / "stream_rows.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "Store('acts.zarr'" in said
    assert "rows of layers [0, 3]" in said


def test_stream_rows_is_short():
    lines = (ROOT / "examples" / "stream_rows.py").read_text().splitlines()
    assert len(lines) < 30


def test_read_without_actcache_agrees_with_actcache(beside_tutorial):
    import actcache

    path = ROOT / "examples" / "read_without_actcache.py"
    spec = importlib.util.spec_from_file_location("read_without_actcache", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = actcache.open("acts.zarr").read(layer=3, sequences=40, positions=7)[0, 0].double().numpy()
    assert (module.Store(Path("acts.zarr")).row(3, 40, 7) == expected).all()


# Links, map, length.


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if path.endswith("images/demo.png"):
            continue  # drawn by `make demo`
        assert found.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{page.name}: {target}"


def test_every_page_is_reachable_from_the_readme():
    seen, todo = set(), [README]
    while todo:
        page = todo.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            found = (page.parent / target).resolve()
            if found.is_file():
                todo.append(found)
    assert seen >= set(PAGES)


def ignored(path: Path) -> bool:
    patterns = [
        line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line and line[0] != "#"
    ]
    return any(fnmatch.fnmatch(path.name, pattern) for pattern in [*patterns, ".git*"])


def on_disk(folder: Path) -> set[str]:
    """Names in a folder as the map writes them: folders end in a slash."""
    return {p.name + "/" * p.is_dir() for p in folder.iterdir() if not ignored(p)}


def test_map_in_the_readme_is_what_is_on_disk():
    listed = listing(README, "## Map")
    assert listed[""] == on_disk(ROOT)
    for folder in ("actcache/", "examples/"):
        assert listed[folder] == on_disk(ROOT / folder) - {"__init__.py"}, folder
    modules = listing(ROOT / "docs" / "explanation" / "architecture.md", "## Modules")
    for folder in ("trainer/", "analysis/"):
        assert modules[folder] == on_disk(ROOT / folder) - {"__init__.py"}, folder


def listing(page: Path, heading: str) -> dict[str, set[str]]:
    """Folder -> what is listed in it, "" being the top, by the block of text under a heading."""
    text = page.read_text(encoding="utf-8")
    block = text.split(heading, 1)[1].split("```text\n", 1)[1].split("```", 1)[0]
    listed: dict[str, set[str]] = {"": set()}
    parent = ""
    for line in block.splitlines():
        name, _, words = line.strip().partition(" ")
        assert words.strip(), f"{name} has no words"
        if line.startswith(" "):
            listed[parent].add(name)
        else:
            parent = name
            listed[""].add(name)
            listed[parent] = set()
    return listed


def test_readme_is_short_and_has_the_block_for_the_demo():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    assert text.index("<!-- demo:begin -->") < text.index("<!-- demo:end -->")
    assert "docs/images/demo.png" in text
