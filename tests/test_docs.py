"""The pages for readers: an index that names them all, places that exist, and a README that fits on two pages."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted(ROOT.glob("docs/**/*.md"))]
TOPS = {p.name for folder in (ROOT, ROOT / "cm_export") for p in folder.iterdir() if p.is_dir()} - {"artifacts", "demo"}


def places(text: str) -> set[str]:
    """Paths that a page names in backticks, from the root or from the package: `cm_export/host/guard.py`, `recipes/*.toml`."""
    words = {word for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()}
    return {w for w in words if re.fullmatch(r"\w+/[\w./*-]*", w) and w.partition("/")[0] in TOPS}


def links(text: str) -> set[str]:
    return {target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target}


def exists(name: str) -> bool:
    return any(any(folder.glob(name.rstrip("/"))) for folder in (ROOT, ROOT / "cm_export"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_place_and_link_of_a_page_exists(page):
    text = page.read_text(encoding="utf-8")
    assert [name for name in sorted(places(text)) if not exists(name)] == []
    assert [target for target in sorted(links(text)) if not (page.parent / target).exists()] == []


def test_a_place_that_moved_is_found():
    text = (
        "see `cm_export/guard.py` and `recipes/*.toml`, `artifacts/x.json`, `a / b`, [x](gone.md) [y](https://x.org/z)"
    )
    assert places(text) == {"cm_export/guard.py", "recipes/*.toml"} and links(text) == {"gone.md"}
    assert exists("recipes/*.toml") and exists("surgery/pipeline.py") and not exists("cm_export/guard.py")


def test_the_index_of_the_docs_names_every_page_in_one_line():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[([\w-]+\.md)\]\(\1\) \| .+ \|$", index, re.M)
    assert sorted(rows) == sorted(p.name for p in PAGES if p.parent.name == "docs" and p.name != "README.md")


def test_readme_and_architecture_stay_short():
    lines = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in PAGES[:2]}
    assert lines["README.md"] <= 110 and lines["ARCHITECTURE.md"] <= 75


def test_the_readme_uses_the_bundle_that_make_demo_builds():
    makefile, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "README.md"))
    demo = re.search(r"^DEMO := (\S+)$", makefile, re.M)[1]
    assert f"--out {demo}" in readme and set(re.findall(r"\S+/demo\.plan", readme)) == {demo}


def test_the_architecture_names_every_package():
    table = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    packages = {p.parent.name for p in (ROOT / "cm_export").glob("*/__init__.py")} - {"recipes"} | {"plugins"}
    named = [word for row in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", table, re.M) for word in re.findall(r"\w+", row)]
    assert set(named) == packages and len(named) == len(packages)
