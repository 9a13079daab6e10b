from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.config import Config, ConfigError
from grpo_fast.tasks.task import Task
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.checkpoint import list_checkpoints
from tests.train.trainer.runs import rows, vowels


@pytest.fixture
def make_disk(tmp_path: Path) -> Any:
    """Makes file systems of some size."""
    made: list[Path] = []

    def make(size: int) -> Path:
        disk = tmp_path / f"disk-{len(made)}"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        done = subprocess.run(mount, capture_output=True, text=True, check=False) if shutil.which("mount") else None
        if done is None or done.returncode:
            pytest.skip("cannot mount a small file system here")
        made.append(disk)
        return disk

    yield make
    for disk in made:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def make(tiny_config: Callable[..., Config], letters: Task) -> Callable[..., GRPOTrainer]:
    """Makes trainers of a tiny run."""
    return lambda **settings: GRPOTrainer(tiny_config(**settings), task=letters, reward_funcs=[vowels])


def size_of(checkpoint: Path) -> int:
    files = [checkpoint] if checkpoint.is_file() else checkpoint.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weights_dtype": "bfloat16", "dtype": "bfloat16"},
        {"offload_optimizer": True},
        {"beta": 0.1, "sync_ref_model": True},
        {"use_peft": True, "lora_r": 64},
    ],
    ids=str,
)
def test_a_checkpoint_has_the_size_that_was_counted(settings: dict[str, Any], make: Callable[..., GRPOTrainer]) -> None:
    with make(max_steps=1, **settings) as trainer:
        trainer.train()
        [checkpoint] = list_checkpoints(trainer.config.output_dir)
        large = sum(
            map(size_of, [*checkpoint.glob("*.safetensors"), *checkpoint.glob("*.pt"), *checkpoint.glob("reference/*")])
        )
        assert 0.5 * size_of(checkpoint) < large
        heads = 64 * 1024  # names and places of the weights
        assert trainer._parts.checkpoint_bytes <= large <= trainer._parts.checkpoint_bytes + heads


def test_a_disk_that_cannot_hold_a_checkpoint_is_told_before_anything_is_loaded(
    make: Callable[..., GRPOTrainer], make_disk: Callable[[int], Path]
) -> None:
    with make(max_steps=1) as trainer:
        needed = trainer._parts.checkpoint_bytes
    disk = make_disk(max(needed - 8192, 4096))
    told = rf"output_dir {disk}/run: a checkpoint needs \d+ MiB .*, and \d+ MiB are free .* name an output_dir on another one"
    with pytest.raises(ConfigError, match=told):
        make(output_dir=disk / "run")
    assert not (disk / "run").exists()


@pytest.mark.slow
def test_what_is_replaced_or_left_over_counts_as_room(
    make: Callable[..., GRPOTrainer], make_disk: Callable[[int], Path]
) -> None:
    with make(max_steps=2, save_steps=1) as trainer:
        trainer.train()
        whole = size_of(trainer.config.output_dir)
        needed, run = trainer._parts.checkpoint_bytes, trainer.config.output_dir
    disk = make_disk(whole + needed // 2)
    shutil.copytree(run, disk / "run")
    assert shutil.disk_usage(disk).free < needed
    with pytest.raises(ConfigError, match="a checkpoint needs"):
        make(output_dir=disk / "run", max_steps=3, save_steps=1, resume_if_exists=True)
    (disk / "run" / "checkpoint-1").rename(disk / "run" / ".checkpoint-1.partial")  # as a kill in the middle of a save leaves
    with make(output_dir=disk / "run", max_steps=3, save_steps=1, resume_if_exists=True) as trainer:
        trainer.train()
    assert [path.name for path in list_checkpoints(disk / "run")] == ["checkpoint-2", "checkpoint-3"]
    with make(output_dir=disk / "run", max_steps=1, overwrite=True) as trainer:
        trainer.train()


def test_a_run_that_is_over_needs_no_room(make: Callable[..., GRPOTrainer], make_disk: Callable[[int], Path]) -> None:
    with make(max_steps=2) as trainer:
        trainer.train()
        run, size = trainer.config.output_dir, size_of(trainer.config.output_dir)
    disk = make_disk(size + 256 * 1024)
    shutil.copytree(run, disk / "run")
    with make(output_dir=disk / "run", max_steps=2, resume_if_exists=True) as trainer:
        assert trainer.train()["stopped_by"] == "max_steps"
    assert [path.name for path in list_checkpoints(disk / "run")] == ["checkpoint-2"]
    with pytest.raises(ConfigError, match="a checkpoint needs"):
        make(output_dir=disk / "run", max_steps=3, resume_if_exists=True)


@pytest.mark.slow
def test_fewer_checkpoints_than_the_run_keeps_are_a_warning(
    make: Callable[..., GRPOTrainer], make_disk: Callable[[int], Path]
) -> None:
    with make(max_steps=1) as trainer:
        trainer.train()
        size = size_of(trainer.config.output_dir / "checkpoint-1")
    disk = make_disk(3 * size + 64 * 1024)
    for settings, told in (
        ({"max_steps": 3}, None),
        ({"max_steps": 6, "save_total_limit": 1}, None),
        ({"max_steps": 6, "save_total_limit": 3}, "enough for 3 more of its checkpoints of"),
    ):
        with make(output_dir=disk / "run", save_steps=1, overwrite=True, **settings) as trainer:
            trainer._open()
        warned = [row["message"] for row in rows(disk / "run", "events") if row["event"] == "warn" and "disk" in row["message"]]
        assert len(warned) == (told is not None)
        assert told is None or (told in warned[0] and "there may be 5 at once, 0 of which are there already" in warned[0])
        assert told is None or "set save_total_limit to 1 or less" in warned[0]
