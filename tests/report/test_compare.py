from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_fast.report import RunError
from grpo_fast.report.compare import compare_runs, table

MakeRun = Callable[..., Path]


def told(paths: list[Path]) -> dict[str, dict[str, str]]:
    heads, rows = table(compare_runs(paths))
    return {Path(row[0]).name: dict(zip(heads, row, strict=True)) for row in rows}


def changed(run: Path, line: str) -> None:
    """Sets a setting of a run that the maker does not."""
    file = run / "config.toml"
    name = line.partition(" ")[0]
    kept = [old for old in file.read_text(encoding="utf-8").splitlines() if not old.startswith(f"{name} ")]
    file.write_text("\n".join([line, *kept]) + "\n", encoding="utf-8")


def test_runs_are_told_by_what_differs_between_them(make_run: MakeRun) -> None:
    first = make_run("a", steps=40, max_steps=40, stopped_by="max_steps")
    other = make_run("b", steps=25, max_steps=40, stopped_by=None)
    changed(first, "learning_rate = 1e-05")
    changed(other, "learning_rate = 0.0003")
    changed(other, 'revision = "v1"')
    changed(other, 'output_dir = "elsewhere"')
    found = told([first, other])
    assert found["a"]["settings that differ"] == "learning_rate=1e-05, revision=none"
    assert found["b"]["settings that differ"] == "learning_rate=0.0003, revision=v1"
    assert (found["a"]["steps"], found["a"]["ended by"]) == ("40 of 40", "max_steps")
    assert (found["b"]["steps"], found["b"]["ended by"]) == ("25 of 40", "unfinished")
    summary = json.loads((first / "summary.json").read_text(encoding="utf-8"))
    assert found["a"]["reward"] == f"{summary['final_reward']:.3f}"
    one, unfinished = (row.to_dict() for row in compare_runs([first, other]))
    assert one["flops"] == summary["compute"]["flops"]
    assert one["wall_hours"] == pytest.approx(summary["compute"]["wall_hours"])
    assert one["reason"] == summary["reason"]
    assert unfinished["wall_hours"] == pytest.approx(one["wall_hours"] * 25 / 40)
    assert unfinished["flops"] == pytest.approx(one["flops"] * 25 / 40)
    assert unfinished["gpu_hours"] == pytest.approx(one["gpu_hours"] * 25 / 40)
    assert (unfinished["stopped_by"], unfinished["reason"]) == (None, None)
    json.dumps([one, unfinished], allow_nan=False)


def test_columns_of_which_nothing_is_known_are_left_out(make_run: MakeRun) -> None:
    runs = [make_run(name, steps=6, max_steps=6, stopped_by="max_steps", eval_steps=0) for name in "ab"]
    heads, _ = table(compare_runs(runs))
    assert "held-out" not in heads
    assert "settings that differ" not in heads


def test_a_directory_stands_for_the_runs_in_it(make_run: MakeRun, tmp_path: Path) -> None:
    for name in ("b", "a"):
        make_run(name, steps=6, max_steps=6, stopped_by="max_steps")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.toml").write_text("seed = 3\n", encoding="utf-8")
    found = compare_runs([tmp_path, tmp_path / "a"])
    assert [one.path.name for one in found] == ["a", "b", "c"]
    assert told([tmp_path])["c"]["ended by"] == "not read"
    [problem] = found[2].problems
    assert (
        problem == f"{tmp_path / 'c'} is not a run: it has no metrics.jsonl; give the output_dir of a run that has done a step"
    )
    assert found[2].to_dict()["problem"] == problem


def test_without_a_run_the_first_problem_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nowhere is not a directory"):
        compare_runs([tmp_path / "nowhere", tmp_path])
    with pytest.raises(RunError, match="name at least one run"):
        compare_runs([])
