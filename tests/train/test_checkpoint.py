from __future__ import annotations

import errno
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_fast.config import Config
from grpo_fast.train.checkpoint import (
    CheckpointError,
    check_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    recover_checkpoints,
    save_checkpoint,
)
from grpo_fast.train.optim import build_optimizer
from grpo_fast.train.policy import Policy

STATE: dict[str, Any] = {"third": 1 / 3, "tiny": 5e-324, "nan": math.nan, "text": "ü", "list": [0.1 + 0.2, None, True, 2**63]}


class Bench:
    """A policy and its optimiser in a run's directory."""

    def __init__(self, policy: Policy, run: Path) -> None:
        self.policy, self.run = policy, run
        self.optimizer = build_optimizer(policy.model, Config(learning_rate=0.01))

    def train(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        for parameter in self.policy.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, step: int, state: dict[str, Any] | None = None) -> Path:
        return save_checkpoint(self.run, step, policy=self.policy, optimizer=self.optimizer, state=state or {"step": step})

    def load(self, path: Path) -> dict[str, Any]:
        return load_checkpoint(path, policy=self.policy, optimizer=self.optimizer)

    def snapshot(self) -> list[torch.Tensor]:
        weights = [value.detach().clone() for value in self.policy.model.parameters()]
        moments = [entry[name].clone() for entry in self.optimizer.state.values() for name in ("step", "exp_avg", "exp_avg_sq")]
        return weights + moments


@pytest.fixture
def bench(tiny_policy: Callable[..., Policy], tmp_path: Path) -> Bench:
    bench = Bench(tiny_policy(), tmp_path / "run")
    bench.train()
    return bench


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_everything_comes_back_bit_by_bit(bench: Bench, tiny_policy: Callable[..., Policy]) -> None:
    before = bench.snapshot()
    path = bench.save(7, STATE)
    assert path == bench.run / "checkpoint-7"
    assert names(bench.run) == {"checkpoint-7"}
    other = Bench(tiny_policy(), bench.run)
    found = other.load(path)
    assert math.isnan(found.pop("nan"))
    assert found == {key: value for key, value in STATE.items() if key != "nan"}
    assert same(other.snapshot(), before)


def test_training_goes_on_as_it_would_have(bench: Bench, tiny_policy: Callable[..., Policy]) -> None:
    path = bench.save(1)
    other = Bench(tiny_policy(), bench.run)
    other.load(path)
    bench.train(seed=1)
    other.train(seed=1)
    assert same(bench.snapshot(), other.snapshot())


def test_saving_a_step_again_replaces_it(bench: Bench) -> None:
    bench.save(3, {"value": 1})
    bench.train(seed=1)
    after = bench.snapshot()
    path = bench.save(3, {"value": 2})
    bench.train(seed=2)
    assert bench.load(path) == {"value": 2}
    assert same(bench.snapshot(), after)
    assert names(bench.run) == {"checkpoint-3"}


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_file_is_named_and_the_way_out(bench: Bench, file: str, damage: str) -> None:
    bench.save(5)
    path = bench.save(9)
    target = path / file
    if damage == "cut":
        target.write_bytes(target.read_bytes()[:-1])
    else:
        target.unlink()
    before = bench.snapshot()
    with pytest.raises(CheckpointError) as caught:
        bench.load(path)
    assert str(target) in str(caught.value)
    aside = path.with_name("damaged-checkpoint-9")
    assert f"`mv {path} {aside}` puts it aside, and the run is resumed from checkpoint-5" in str(caught.value)
    assert same(bench.snapshot(), before)
    path.rename(aside)
    assert [left.name for left in prune_checkpoints(bench.run, keep=1)] == ["checkpoint-5"]
    assert aside.is_dir()


@pytest.mark.parametrize("content", [None, "{", "[]", '{"step": 1}', '{"files": 3}'])
def test_a_broken_manifest_is_told(bench: Bench, content: str | None) -> None:
    bench.save(5)
    path = bench.save(9)
    (path / "manifest.json").unlink()
    if content is not None:
        (path / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"checkpoint-9 has no readable manifest\.json .*resumed from checkpoint-5"):
        check_checkpoint(path)


def test_without_another_checkpoint_a_new_run_is_the_way_out(bench: Bench) -> None:
    path = bench.save(5)
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=rf"no other checkpoint is left; a new run in another .* --model {path}$"):
        bench.load(path)


def test_right_size_with_wrong_content_is_told(bench: Bench) -> None:
    path = bench.save(5)
    for name in ("state.json", "optimizer.pt", "model.safetensors"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(b"\xff" * len(whole))
        with pytest.raises(CheckpointError, match="checkpoint-5 cannot be read"):
            bench.load(path)
        (path / name).write_bytes(whole)
    bench.load(path)


def test_a_crash_between_the_two_renames_is_recovered(bench: Bench) -> None:
    before = bench.snapshot()
    path = bench.save(4)
    path.rename(bench.run / ".checkpoint-4.old")
    shutil.copytree(bench.run / ".checkpoint-4.old", bench.run / ".checkpoint-4.partial")
    [found] = list_checkpoints(bench.run)
    assert found.name == ".checkpoint-4.old", "a reader moves nothing: a run may be writing"
    check_checkpoint(found)
    assert recover_checkpoints(bench.run) == [path]
    assert list_checkpoints(bench.run) == [path]
    bench.train(seed=1)
    bench.load(path)
    assert same(bench.snapshot(), before)


def test_a_reader_in_the_middle_of_a_replacement_does_not_disturb_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It put the old one back, so that the new one could not take its place."""
    path, seen, rename = bench.save(4, {"value": 1}), [], Path.rename

    def watched(self: Path, target: Path) -> Path:
        renamed = rename(self, target)
        seen.append([found.name for found in list_checkpoints(bench.run)])
        return renamed

    monkeypatch.setattr(Path, "rename", watched)
    bench.save(4, {"value": 2})
    assert seen == [[".checkpoint-4.old"], ["checkpoint-4"]]
    assert bench.load(path) == {"value": 2}


def test_a_replacement_that_fails_puts_the_old_one_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = bench.save(4, {"value": 1}), Path.rename

    def full(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(CheckpointError, match=f"the disk is full; the newest whole checkpoint is {path}"):
        bench.save(4, {"value": 2})
    assert bench.load(path) == {"value": 1}


def test_a_crash_after_the_renames_leaves_the_new_one(bench: Bench) -> None:
    path = bench.save(4, {"value": 1})
    shutil.copytree(path, bench.run / ".checkpoint-4.old")
    assert list_checkpoints(bench.run) == [path]
    bench.save(4, {"value": 2})
    assert bench.load(path) == {"value": 2}
    assert names(bench.run) == {"checkpoint-4"}


def test_order_is_by_step_and_other_names_are_passed_over(bench: Bench) -> None:
    bench.run.mkdir()
    for name in (
        "checkpoint-10",
        "checkpoint-9",
        "checkpoint-100",
        "checkpoint-x",
        "checkpoint-3-copy",
        ".checkpoint-7.partial",
    ):
        (bench.run / name).mkdir()
    assert [path.name for path in list_checkpoints(bench.run)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert list_checkpoints(bench.run / "none") == []


def test_pruning_keeps_the_newest_and_the_protected_one(bench: Bench) -> None:
    paths = [bench.save(step) for step in (1, 2, 3, 10)]
    for leftover in (".checkpoint-2.partial", ".checkpoint-1.deleted", ".checkpoint-10.old"):
        (bench.run / leftover).mkdir()
        (bench.run / leftover / "file").touch()
    (bench.run / "metrics.jsonl").touch()
    prune_checkpoints(bench.run, keep=2, protect={paths[0].name})
    assert names(bench.run) == {"checkpoint-1", "checkpoint-3", "checkpoint-10", "metrics.jsonl"}
    assert prune_checkpoints(bench.run, keep=1) == paths[3:]
    assert names(bench.run) == {"checkpoint-10", "metrics.jsonl"}
    check_checkpoint(paths[3])


def test_a_directory_that_cannot_be_written_is_told(bench: Bench) -> None:
    bench.run.parent.mkdir(exist_ok=True)
    bench.run.write_text("a file where the run should be", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cannot save .*checkpoint-1: writing failed"):
        bench.save(1)


def test_a_mistake_that_is_no_write_failure_keeps_its_type(bench: Bench) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        bench.save(1, {"value": object()})
    assert names(bench.run) == set()


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from grpo_fast.config import Config
from grpo_fast.train.checkpoint import CheckpointError, check_checkpoint, save_checkpoint
from grpo_fast.train.optim import build_optimizer
from grpo_fast.train.policy_source import PolicySource

model, run = sys.argv[1], Path(sys.argv[2])
policy = PolicySource(Config(model=model, max_completion_length=8)).load()
optimizer = build_optimizer(policy.model, Config())
for parameter in policy.model.parameters():
    parameter.grad = torch.ones_like(parameter)
optimizer.step()
save = lambda step: save_checkpoint(run, step, policy=policy, optimizer=optimizer, state={"step": step})
first = save(1)
sizes = {name: (first / name).stat().st_size for name in ("state.json", "model.safetensors", "optimizer.pt")}
assert sizes["state.json"] < 500 < sizes["model.safetensors"] < sizes["optimizer.pt"], sizes
for limit in (500, sizes["model.safetensors"] + 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        save(2)
    except CheckpointError as error:
        print(error)
    else:
        print("saved within", limit)
    check_checkpoint(first)
    print(sorted(path.name for path in run.iterdir()))
"""


@pytest.mark.slow
def test_a_file_that_cannot_grow_leaves_the_older_checkpoint_alone(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tiny_model), str(run)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    for message, left in (told[:2], told[2:]):
        assert message.startswith(f"cannot save {run / 'checkpoint-2'}: writing failed")
        assert f"the newest whole checkpoint is {run / 'checkpoint-1'}" in message
        assert left == "['checkpoint-1']"


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system that is soon full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    made = subprocess.run(mount, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if made is None or made.returncode:
        pytest.skip(f"cannot mount a small file system here ({'no mount' if made is None else made.stderr.strip()})")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("victim", ["model.safetensors", "optimizer.pt", "state.json"])
def test_a_full_disk_leaves_the_older_checkpoint_alone(
    victim: str, tiny_policy: Callable[..., Policy], small_disk: Path
) -> None:
    bench = Bench(tiny_policy(), small_disk / "run")
    bench.train()
    state = {"text": "x" * 30_000}
    first = bench.save(1, state)
    order = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    order += ["optimizer.pt", "state.json"]
    sizes = [(first / name).stat().st_size for name in order]
    place = order.index(victim)
    room = sum(size + 4096 for size in sizes[:place]) + sizes[place] // 2
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - room))
    with pytest.raises(CheckpointError) as caught:
        bench.save(2, state)
    assert "checkpoint-2: the disk is full; the newest whole checkpoint is" in str(caught.value)
    assert f"grpo-fast train --resume {bench.run}" in str(caught.value)
    assert names(bench.run) == {"checkpoint-1"}
    check_checkpoint(first)
    del caught  # the failed writer keeps its file open, and with it the disk full
    (small_disk / "filler").unlink()
    second = bench.save(2, state)
    assert list_checkpoints(bench.run) == [first, second]
