from __future__ import annotations

from pathlib import Path

import pytest

from grpo_fast.config import Config
from grpo_fast.train.distributed import ALONE
from grpo_fast.train.handshake import shake_hands
from tests.train.distributed.launches import torchrun


@pytest.mark.slow
def test_what_all_ranks_would_say_is_said_once(tiny_model: Path, tmp_path: Path) -> None:
    flags = ["--model", tiny_model, "--dataset", "none.jsonl", "--max-completion-length", "8", "--output-dir", "run"]
    done = torchrun(2, "grpo_fast", "train", *flags, cwd=tmp_path, options=("--module",))
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "none.jsonl" in done.stderr
    assert not (tmp_path / "run").exists()


def test_one_process_has_nobody_to_compare_with(tmp_path: Path) -> None:
    assert not shake_hands(Config(output_dir=tmp_path / "new" / "run", fsdp="hybrid_shard"), ALONE, resume=False)
    assert shake_hands(Config(output_dir=tmp_path / "new" / "run"), ALONE, resume=True)
    assert not list(tmp_path.iterdir())
