"""The one command: every case in miniature, results that outlive a crash, and a budget that tells what it left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import device
from benchmarks.ops.cases import HeadCase, smoke_cases
from benchmarks.ops.measure import Ceilings, Clock
from benchmarks.ops.pictures import draw
from benchmarks.ops.suite import Bench

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # rivals'


@pytest.fixture(autouse=True)
def stance():
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> tuple[int, Path]:
    path = tmp_path_factory.mktemp("smoke") / "ops.json"
    return device.main(["--smoke", "--output", str(path), "--threads", str(torch.get_num_threads())]), path


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_case_runs_in_miniature_and_nothing_is_wrong(smoke) -> None:
    code, path = smoke
    content = read(path)
    assert [record["case"] for record in content["cases"]] == [case.name for case in smoke_cases()]
    assert content["left_out"] == []
    for record in content["cases"]:
        for row in record["rows"]:
            assert row["status"] in {"ok", "refused", "missing"}, (record["case"], row)
            assert row["status"] == "ok" or row["reason"]
    assert code == 0
    assert {row["package"] for row in content["contenders"]} >= {"trl", "liger-kernel", "quack-kernels"}


@pytest.mark.slow
def test_results_say_where_they_come_from(smoke) -> None:
    content = read(smoke[1])
    assert content["device"]["kind"] == "cpu"
    assert content["ceilings"]["gemm_flops"]["float32"] > 0
    assert all(record["commit"] and record["date"] for record in content["cases"])
    assert content["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_results_become_a_picture(smoke) -> None:
    picture = draw(smoke[1])
    assert picture.name == "ops.png"
    assert picture.stat().st_size > 20_000


def run(path: Path, *options: str) -> int:
    return device.main(["--smoke", "--output", str(path), "--only", "Qwen2.5-7B, T=64", *options])


def test_a_budget_leaves_out_what_it_does_not_reach(tmp_path, capsys) -> None:
    path = tmp_path / "ops.json"
    run(path, "--budget", "0")
    content = read(path)
    assert content["cases"] == []
    assert len(content["left_out"]) > 5
    assert "left out" in capsys.readouterr().out


def test_what_was_measured_survives_a_crash_and_is_not_measured_again(tmp_path, monkeypatch) -> None:
    path, measured = tmp_path / "ops.json", []
    real = device.run_case

    def crash_at_the_third(bench, case):
        measured.append(case.name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return real(bench, case)

    monkeypatch.setattr(device, "run_case", crash_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(path)
    assert [record["case"] for record in read(path)["cases"]] == measured[:2]
    run(path, "--resume")
    names = [record["case"] for record in read(path)["cases"]]
    assert len(measured) == len(names) + 1
    assert measured.count(names[0]) == 1


def test_the_file_is_there_before_the_first_case(tmp_path, monkeypatch) -> None:
    def crash(bench, case):
        raise KeyboardInterrupt

    monkeypatch.setattr(device, "run_case", crash)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "ops.json")
    assert "tests" in read(tmp_path / "ops.json"), "a worker that is started again says what they said"


def test_a_case_that_breaks_is_told_and_the_next_one_runs(tmp_path, monkeypatch) -> None:
    path, real = tmp_path / "ops.json", device.run_case

    def breaks(bench, case):
        if isinstance(case, HeadCase) and case.frozen_head:
            raise RuntimeError("no room for float64")
        return real(bench, case)

    monkeypatch.setattr(device, "run_case", breaks)
    assert run(path) == 1
    content = read(path)
    assert len(content["cases"]) > 5
    assert any("no room for float64" in row["reason"] for row in content["left_out"])


def test_what_contenders_compiled_is_expected_of_the_next_case() -> None:
    cpu, case = torch.device("cpu"), next(case for case in smoke_cases() if isinstance(case, HeadCase))
    bench = Bench(cpu, Clock(cpu), Ceilings({"float32": 1e11}, 1e10), 6.0)
    before = device.estimate(bench, case)
    bench.overheads_s |= {"torch eager": 7.0, "of no such name": 70.0}
    assert device.estimate(bench, case) == pytest.approx(before + 7.0)


def test_results_of_another_format_are_refused(tmp_path) -> None:
    path = tmp_path / "ops.json"
    path.write_text('{"format": 0, "cases": []}', encoding="utf-8")
    with pytest.raises(ValueError, match="format 0"):
        run(path, "--resume")


def test_the_list_of_cases_runs_nothing(capsys) -> None:
    assert device.main(["--smoke", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(smoke_cases())


def test_a_banned_contender_is_listed_with_the_reason(tmp_path) -> None:
    path = tmp_path / "ops.json"
    assert run(path, "--ban", "torch eager=took the device down in some case") == 0
    rows = [row for record in read(path)["cases"] for row in record["rows"] if row["contender"] == "torch eager"]
    assert rows
    assert all((row["status"], row["reason"]) == ("failed", "took the device down in some case") for row in rows)
    assert not path.with_suffix(".trying").exists()


@pytest.mark.slow
def test_the_whole_command_with_its_worker(tmp_path, monkeypatch, capfd) -> None:
    path = tmp_path / "ops.json"
    monkeypatch.setenv("PYTHONPATH", str(Path(device.__file__).parents[1]))
    assert device.main(["--device", "cpu", "--only", "group_advantage, 64", "--output", str(path)]) == 0
    content = read(path)
    assert [record["case"] for record in content["cases"]] == ["group_advantage, 64 x 16, group"]
    assert content["cases"][0]["rows"][0]["peak_extra_bytes"] is not None
    assert (tmp_path / "ops.png").exists()
    assert "grpo_fast" in capfd.readouterr().out
