"""Links lead somewhere, paths exist, the layer picture is the tool's, and figures have records."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.docs.blocks import DOCUMENTS, NAMES, ROOT, blocks_of, prose_of

_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_FILE = re.compile(r"[\w./-]+\.(?:py|toml|jsonl|md)|(?:src|tests|docs|benchmarks)/[\w./-]*")
_ROW = re.compile(r"^\|.*\| `(?P<metric>\w+)` \| (?P<value>[^|]+) \|$", re.MULTILINE)
_HOMES = (ROOT, ROOT / "src" / "kvswap")


def anchors_of(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as they are made on the web."""
    titles = re.findall(r"^#+ (.+)$", prose_of(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_links_within_the_project_lead_somewhere(path: Path) -> None:
    for link in _LINK.findall(prose_of(path)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name}: {link} leads nowhere"
        assert not anchor or anchor in anchors_of(target), f"{path.name}: {link}: no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_files_that_are_named_exist(path: Path) -> None:
    for code in _CODE.findall(prose_of(path)):
        if "/" in code and _FILE.fullmatch(code):
            homes = (path.parent, *_HOMES)
            assert any((home / code).exists() for home in homes), f"{path.name}: no {code}"


def test_files_of_the_decode_step_exist() -> None:
    step = blocks_of(ROOT / "docs/concepts/data-flow.md")[0].source
    named = re.findall(r"\w+/\w+\.py", step)
    assert named
    for name in named:
        assert (ROOT / "src" / "kvswap" / name).exists(), f"data-flow.md: no {name}"


def test_layer_picture_is_what_the_tool_checks() -> None:
    picture = blocks_of(ROOT / "docs/concepts/architecture.md")[0].source
    drawn = [re.split(r"\s{2,}", line)[0] for line in picture.splitlines()]
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^layers = \[(.*?)\]", settings, re.DOTALL | re.MULTILINE)
    assert found is not None
    checked = [layer.replace("kvswap.", "") for layer in re.findall(r'"([^"]+)"', found[1])]
    assert drawn == checked


def test_error_tree_is_the_code_s() -> None:
    from kvswap.core import errors

    tree = next(
        block.source
        for block in blocks_of(ROOT / "docs/concepts/architecture.md")
        if block.source.startswith("KVSwapError")
    )
    drawn = set(re.findall(r"\b\w+Error\b", tree))
    ours = {name for name, item in vars(errors).items() if _is_ours(item, errors.KVSwapError)}
    builtin = {"ValueError", "TypeError", "RuntimeError", "OSError"}
    assert drawn - builtin == ours


def _is_ours(item: object, root: type) -> bool:
    return isinstance(item, type) and issubclass(item, root)


def newest_values() -> dict[str, float]:
    """Return the value of the newest record of each metric."""
    records = [
        json.loads(line)
        for path in sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    return {
        record["metric"]: record["value"] for record in sorted(records, key=lambda r: r["date"])
    }


def test_figures_of_the_readme_are_those_of_the_newest_records() -> None:
    rows = _ROW.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert rows
    newest = newest_values()
    for metric, shown in rows:
        if shown.strip() == "—":  # not filled in yet
            continue
        figure = re.match(r"-?[\d,]+(?:\.(\d+))?", shown.strip())
        assert figure is not None, f"{metric}: {shown!r} is not a figure"
        assert metric in newest, f"{metric}: no record says {shown.strip()}"
        half = 0.5 * 10 ** -len(figure[1] or "")
        stated = float(figure[0].replace(",", ""))
        assert abs(stated - newest[metric]) <= half * 1.001, f"{metric}: {newest[metric]}"


@pytest.mark.parametrize(
    ("document", "table"), [("README.md", "brief"), ("docs/concepts/methods.md", "whole")]
)
def test_the_table_of_methods_is_that_of_its_newest_record(document: str, table: str) -> None:
    lines = (ROOT / "benchmarks/results/quality.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if '"methods_in_table"' in line]
    newest = max(records, key=lambda record: str(record["date"]))
    assert newest["extra"]["tables"][table] in (ROOT / document).read_text(encoding="utf-8")
