"""What the ranks of a test make of every run in a JSON file, each rank's findings to a JSON file of its own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from tests.train.distributed.rank_program import play


def main(cases: Path, output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {name: play(values) for name, values in json.loads(cases.read_text(encoding="utf-8")).items()}
    (output / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
