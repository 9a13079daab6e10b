from __future__ import annotations

from pathlib import Path

from grpo_fast.config import Config
from grpo_fast.train.distributed import ALONE
from grpo_fast.train.handshake import shake_hands


def test_one_process_has_nobody_to_compare_with(tmp_path: Path) -> None:
    assert not shake_hands(Config(output_dir=tmp_path / "new" / "run", fsdp="hybrid_shard"), ALONE, resume=False)
    assert shake_hands(Config(output_dir=tmp_path / "new" / "run"), ALONE, resume=True)
    assert not list(tmp_path.iterdir())
