"""The tuner of the head's table runs through everything without a GPU, and refuses what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; there is nothing to tune")

from benchmarks import tune_head
from benchmarks.ops.cases import HeadCase
from benchmarks.ops.measure import Clock
from grpo_fast.ops import head_shapes, head_triton
from grpo_fast.ops.head_shapes import Choice, Key, Tile

CPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.slow
def test_smoke_fills_a_table_that_the_package_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    other = {**Key(80, "bfloat16", 8, 16, 8, plain=True)._asdict(), "tier": 1, "tile": [1, 1, 1, 0, 1, 1, False]}
    path.write_text(json.dumps({"measured": [other]}), encoding="utf-8")
    assert tune_head.main(["--smoke", "--output", str(path), "--allowance", "0"]) == 0
    entries = json.loads(path.read_text(encoding="utf-8"))["measured"]
    assert [entry["arch"] for entry in entries] == [80, 90]
    entry = entries[1]
    assert entry["refused"] == {}
    assert len(entry["times"]["stored"]) == len(entry["times"]["forward"]) == 3
    fastest = min(entry["times"]["stored"].items(), key=lambda item: item[1]["p50_ms"])[0]
    assert fastest.startswith(f"tier {entry['tier']}")
    assert entry["device"]
    assert entry["versions"]["torch"] == torch.__version__
    assert {"commit", "date"} <= entry.keys()
    assert "tier 2, 32x64x16x1x3x4x1" in capsys.readouterr().out
    monkeypatch.setattr(head_shapes, "_measured", lambda: tuple(entries))
    found = head_shapes.choose(head_shapes.key_of(entry))
    assert found == Choice(entry["tier"], Tile(*entry["tile"]), measured=True)


@pytest.mark.slow
def test_what_is_wrong_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = head_triton.head_exp_block

    def coarse(*arguments: object, **options: object) -> object:
        block = right(*arguments, **options)
        return block._replace(others=block.others * 1.01)

    def broken(*arguments: object, **options: object) -> object:
        raise RuntimeError("out of resource: shared memory\nand more")

    for changed, reason in (
        (coarse, "log-probabilities and E wrong"),
        (broken, "RuntimeError: out of resource: shared memory"),
    ):
        monkeypatch.setattr(head_triton, "head_exp_block", changed)
        entry = tune_head.measure(tune_head.SMOKE_MODEL, 16, "float16", clock=Clock(CPU), smoke=True, allowance_s=0.0)
        assert entry["tier"] == 1
        assert list(entry["times"]["stored"]) == ["tier 1"]
        assert set(entry["refused"].values()) == {reason}
        assert len(entry["refused"]) == 2


@pytest.mark.slow
def test_what_breaks_while_it_is_timed_does_not_win(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = head_triton.head_exp_block, 0

    def breaks_after_its_checks(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise RuntimeError("out of memory")
        return right(*arguments, **options)

    monkeypatch.setattr(head_triton, "head_exp_block", breaks_after_its_checks)
    entry = tune_head.measure(tune_head.SMOKE_MODEL, 16, "float16", clock=Clock(CPU), smoke=True, allowance_s=0.0)
    assert entry["tier"] == 1
    assert {kind: list(found) for kind, found in entry["times"].items()} == {"stored": ["tier 1"], "forward": ["tier 1"]}
    assert list(entry["refused"].values()) == ["while it was timed, RuntimeError: out of memory"] * 2


def test_a_head_for_which_nothing_is_right_does_not_end_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune_head, "complaint", lambda work, rows: "log-probabilities wrong")
    monkeypatch.setattr(tune_head, "ROWS_OF_SMOKE", (8, 16))
    assert tune_head.main(["--smoke", "--output", str(tmp_path / "table.json")]) == 1
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(" rows: ")[0] for line in told] == ["tiny, 8", "tiny, 16"]
    assert "no entry, RuntimeError: no candidate runs and is right: {'tier 1': 'log-probabilities wrong'" in told[0]
    assert not (tmp_path / "table.json").exists()


def test_tensor_cores_are_forgiven_what_they_cut_off_and_others_nothing() -> None:
    rows = tune_head.head_rows(HeadCase(tune_head.SMOKE_MODEL, 16, "forward", dtype="float32"), torch.device("cpu"))
    assert tune_head._cut(rows, 30.0) == 0.0
    rows.hidden = SimpleNamespace(is_cuda=True, shape=(16, 2048))  # type: ignore[assignment]
    assert tune_head._cut(rows, 30.0) == pytest.approx(128 * 2**-23 * 30)


def test_tables_are_merged_by_key() -> None:
    one, two = ({**Key(arch, "bfloat16", 8, 16, 8, plain=True)._asdict(), "tier": 1} for arch in (90, 80))
    newer = {**one, "tier": 2}
    assert tune_head.merged([one, two], [newer]) == [two, newer]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_candidates_have_names_of_their_own(arch: int) -> None:
    found = tune_head.candidates(arch, smoke=False)
    assert len(found) == 1 + len(tune_head.tiles(arch, smoke=False)) > 5
    assert next(iter(found)) == "tier 1"
    assert all(choice.tile.columns >> choice.tile.splits >= 16 for choice in found.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
@pytest.mark.parametrize(("arguments", "message"), [([], "no CUDA device"), (["--smoke"], "needs --output")])
def test_what_cannot_be_measured_is_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune_head.main(arguments)
    assert message in capsys.readouterr().err
