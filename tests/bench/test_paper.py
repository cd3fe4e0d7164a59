"""The paper's evaluation: what contenders are, that claims hold what was timed, and a toy run."""

from __future__ import annotations

import json
import lzma
from dataclasses import replace

import pytest
import torch

from benchmarks.paper import experiments
from benchmarks.paper.answers import Answers
from benchmarks.paper.cells import Cells
from benchmarks.paper.claims import CLAIMS, best, ceiling, gain, interval
from benchmarks.paper.contenders import (
    ALL,
    AS_THE_PAPER_RAN_THEM,
    GIVEN_OUR_ENGINE,
    IN_MEMORY,
    KVSWAP_PUBLISHED,
    KVSWAP_TIGHT,
    ON_DISK,
    OURS,
    Contender,
)
from benchmarks.paper.findings import Findings
from benchmarks.paper.report import write_report
from benchmarks.paper.steps import Cell, equal_memory, is_within
from kvswap.bench.evaluation import Asking, Plan
from kvswap.bench.reader import load_reader
from kvswap.bench.synthetic import SHAPES
from kvswap.bench.tasks import Words
from kvswap.core.geometry import KVGeometry
from tests.scripts import ROOT, run_script

SHAPE = KVGeometry(num_layers=4, num_heads=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")
CELL = Cell(shape="qwen3-0.6b", layers=4, context=32768, batch=8, device="emmc")


def config_of(contender: Contender, memory: int, tokens: int | None = None):
    return contender.config(
        SHAPE,
        device=CELL.device,
        tokens=tokens or contender.tokens,
        batch_size=CELL.batch,
        directory=".",
        kv_memory=memory,
        max_context=CELL.context + 512,
    )


@pytest.mark.parametrize("contender", [*ON_DISK, *OURS], ids=lambda each: each.name)
def test_every_contender_is_a_cache_within_the_memory_of_all(contender):
    memory = equal_memory(SHAPE, CELL)
    full = CELL.batch * CELL.context * SHAPE.token_bytes
    assert memory < full / 10
    # Where a group is a token, tables are larger, and a smaller rank has to do.
    least = replace(contender, rank_share=contender.rank_share / 4)
    assert is_within(SHAPE, config_of(least, memory), CELL)


def test_memory_is_what_kvswap_as_published_needs():
    memory = equal_memory(SHAPE, CELL)
    assert not is_within(SHAPE, config_of(KVSWAP_PUBLISHED, memory * 19 // 20), CELL)
    tight = equal_memory(SHAPE, Cell(**{**CELL.to_dict(), "is_tight": True}))
    assert tight < memory / 2
    assert is_within(SHAPE, config_of(KVSWAP_TIGHT, tight), CELL)


def test_as_the_paper_ran_them_nothing_is_kept_but_where_its_name_says_so():
    keeps = {each.name for each in AS_THE_PAPER_RAN_THEM if each.reuse}
    assert keeps == {"FlexGen", "InfiniGen* + reuse", "SolidAttention"}
    assert all(each.reuse and each.slots_of_budget for each in GIVEN_OUR_ENGINE)
    assert all(not each.attends_to_prediction for each in GIVEN_OUR_ENGINE)


def test_every_claim_has_a_cell_and_its_baselines_stand_in_it():
    cells = experiments.parts(4)["claims"]
    places = {(cell.device, cell.batch) for cell in cells}
    assert len(places) == len(cells)
    for claim in CLAIMS:
        assert (claim.device, claim.batch) in places
        assert set(claim.baselines) <= {each.name for each in ALL}
    assert {(device, 1) for device in experiments.CLAIMED_DEVICES} <= places


def test_every_part_has_shapes_that_are_known():
    for cells in experiments.parts(4).values():
        assert {cell.shape for cell in cells} <= set(SHAPES)


def finding(it: list[float], kvswap: list[float], compute: list[float]) -> dict:
    return {"seconds": {"it": it, "kvswap": kvswap, "compute": compute}}


def test_the_best_baseline_is_the_one_that_least_is_gained_over():
    findings = {
        "slow": finding([9.0, 9.0, 9.0], [1.0, 1.0, 1.0], [0.5, 0.5, 0.5]),
        "fast": finding([3.0, 2.0, 4.0], [1.0, 1.0, 2.0], [0.5, 0.5, 0.5]),
    }
    found = best(findings, ("slow", "fast", "not timed"))
    assert found is findings["fast"]
    assert gain(found) == 2.0
    assert ceiling(found) == 6.0


def test_an_interval_holds_the_median_and_is_that_of_the_same_seed():
    samples = [1.0, 1.1, 0.9, 1.05, 1.2]
    low, high = interval(samples)
    assert low <= 1.05 <= high
    assert interval(samples) == (low, high)


SETTING = {"reader": "llama", "questions": 6, "seed": 0}


def kept(name: str, **fields) -> dict:
    """Return a finding as a run keeps it."""
    side = {"memory": {"total": 2**20}, "bytes_read_per_token": 0.0, "hit_rate": 0.5}
    what = {"tokens": 512, "rank_share": 0.125, "recall": 0.9, "is_reached": True, "raises": True}
    own = {"contender": "kvswap, groups of 4, raw", **what}
    timed = {"reports": {"it": side, "kvswap": side}, "ours": own, **what}
    timed |= finding([2.0], [1.0], [0.5])
    named = {"setting": SETTING, "cell": CELL.to_dict(), "contender": name}
    return named | (fields or timed)


def test_memory_of_all_keys_and_values_is_that_of_the_shape():
    assert CELL.full_bytes == CELL.batch * CELL.context * SHAPE.token_bytes
    assert CELL.full_bytes < CELL.in_memory_bytes < 2 * CELL.full_bytes


def cells_of(path) -> Cells:
    return Cells(None, None, Findings(path, SETTING), samples=1, seed=0)


def test_a_report_of_packed_findings_says_what_has_no_room(tmp_path):
    found = [
        kept("ShadowKV"),
        kept("Loki", commit="x"),
        kept(IN_MEMORY.name, needs_bytes=7 << 30, free_bytes=5 << 30),
    ]
    path = tmp_path / "cells.jsonl.xz"
    path.write_bytes(lzma.compress("".join(json.dumps(x) + "\n" for x in found).encode()))
    cells = cells_of(path)
    write_report(tmp_path / "report.html", {"claims": [CELL]}, cells)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "does not fit: needs 7,168 MiB, 5,120 free" in page
    assert "does not fit the memory of all" in page
    assert f"1/{CELL.full_bytes / 2**20:.1f}" in page
    assert set(cells.of(CELL)) == {"ShadowKV"}
    assert set(cells.known(CELL)) == {"ShadowKV", "Loki", IN_MEMORY.name}


def test_findings_of_another_setting_are_left_alone(tmp_path):
    path = tmp_path / "cells.jsonl"
    Findings(path, SETTING).keep(kept("ShadowKV"))
    other = Findings(path, SETTING | {"seed": 1})
    assert other.of(CELL.to_dict()) == {}
    other.keep(kept("ShadowKV") | {"setting": SETTING | {"seed": 1}, "tokens": 99})
    again = Findings(path, SETTING)
    assert again.of(CELL.to_dict())["ShadowKV"]["tokens"] == 512


def test_a_line_that_was_cut_off_is_written_over(tmp_path):
    path = tmp_path / "cells.jsonl"
    Findings(path, SETTING).keep(kept("ShadowKV"))
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps(kept("Loki")).encode()[:40])
    found = Findings(path, SETTING)
    assert set(found.of(CELL.to_dict())) == {"ShadowKV"}
    found.keep(kept("Loki"))
    assert path.read_bytes().startswith(whole)
    assert set(Findings(path, SETTING).of(CELL.to_dict())) == {"ShadowKV", "Loki"}


def test_what_had_no_room_is_tried_again_where_there_is_some(tmp_path):
    path = tmp_path / "cells.jsonl"
    Findings(path, SETTING).keep(kept(IN_MEMORY.name, needs_bytes=1 << 60, free_bytes=0))
    assert cells_of(path).left(CELL, [IN_MEMORY]) == []
    Findings(path, SETTING).keep(kept(IN_MEMORY.name, needs_bytes=1, free_bytes=0))
    assert cells_of(path).left(CELL, [IN_MEMORY]) == [IN_MEMORY]


def test_the_papers_tables_have_its_baselines_with_the_tokens_it_gave_them():
    for part in ("table4", "figure10"):
        taken = [each for each in ON_DISK if experiments.takes(CELL, each, part=part)]
        assert all(each.index is None or each.tokens == 400 for each in taken)
        assert {each.name for each in taken if each.raises} <= {"FlexGen", KVSWAP_PUBLISHED.name}
        assert "ShadowKV, 400 tokens" in {each.name for each in taken}
    for part in ("claims", "figure11"):
        taken = [each for each in ON_DISK if experiments.takes(CELL, each, part=part)]
        assert all(each.raises for each in taken)


def test_everything_in_memory_stands_beside_the_methods_but_not_in_the_claims():
    assert IN_MEMORY in ALL
    assert IN_MEMORY not in ON_DISK
    for part in ("claims", "table4", "figure10", "figure11"):
        assert experiments.takes(CELL, IN_MEMORY, part=part)
    assert all(IN_MEMORY.name not in claim.baselines for claim in CLAIMS)


def test_answers_with_all_selected_are_those_of_full_attention_and_are_kept(tmp_path):
    model, tokenizer = load_reader(torch.float32, directory=ROOT / "benchmarks/readers/llama")
    plan = Plan(
        tasks=("vt",), language=Words(), language_name="words", context_tokens=512, samples=2,
        questions=2,
    )  # fmt: skip
    answers = Answers(
        asking=Asking(model, tokenizer), plan=plan, work=tmp_path / "work", directory=tmp_path
    )
    every = answers.of(OURS[-1], 16, 512)
    assert every == answers.of(AS_THE_PAPER_RAN_THEM[0], 64, 512)
    assert set(every) == {"vt"}
    kept = (tmp_path / "work" / "answers.jsonl").read_text(encoding="utf-8")
    assert every == answers.of(OURS[-1], 16, 512)
    assert kept == (tmp_path / "work" / "answers.jsonl").read_text(encoding="utf-8")
    assert [each.name for each in tmp_path.iterdir()] == ["work"]


@pytest.mark.smoke
def test_a_run_keeps_findings_goes_on_and_writes_a_report(tmp_path):
    options = ["--quick", "--questions", "1", "--samples", "2"]
    options += ["--kv-dir", str(tmp_path), "--work", str(tmp_path / "work")]
    options += ["--contenders", "KVSwap as published, no reuse", IN_MEMORY.name]
    path_of_cells, texts = tmp_path / "work" / "cells.jsonl", []
    for more in ([], ["table4"]):  # of the same cell: what has been timed is not timed again
        done = run_script("benchmarks.paper", *options, "--only", "ablation", *more)
        assert done.returncode == 0, done.stderr[-2000:]
        texts.append(path_of_cells.read_text(encoding="utf-8"))
    assert texts[1].startswith(texts[0])
    found = [json.loads(line) for line in texts[1].splitlines()]
    assert [each["contender"] for each in found] == [
        "KVSwap as published, no reuse",
        IN_MEMORY.name,
    ]
    resident = found[1]
    assert resident["recall"] == 1.0
    assert resident["reports"]["it"]["memory"]["total"] == Cell(**resident["cell"]).full_bytes
    assert resident["ours"] == found[0]["ours"]
    reports = found[0]["reports"]
    assert reports["kvswap"]["hit_rate"] > reports["it"]["hit_rate"] == 0
    page = (tmp_path / "work" / "report.html").read_text(encoding="utf-8")
    assert all(each["contender"] in page for each in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["work"]
