"""Two ranks whose checkpoints go wrong on one of them: each tells in a JSON file what it was told. In the end rank 1 dies."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from grpo_fast.config import Config
from grpo_fast.train.checkpoint import load_checkpoint, save_checkpoint
from grpo_fast.train.distributed import World
from grpo_fast.train.optim import build_optimizer
from grpo_fast.train.policy_source import PolicySource
from grpo_fast.train.sharding import ShardedPolicy


class Stumbling(ShardedPolicy):
    """Its weights are not read on rank 1."""

    stumble: Callable[[], None] | None = None

    def load_weights(self, directory: Path) -> None:
        if self.stumble is not None and dist.get_rank() == 1:
            self.stumble()
        super().load_weights(directory)


def main(model: str, directory: str) -> None:
    torch.set_num_threads(1)
    output = Path(directory)
    world = World.join(torch.device("cpu"), timeout_s=60)
    config = Config(model=model, device="cpu", fsdp="full_shard", max_completion_length=8)
    source = PolicySource(config)
    policy = Stumbling(source.load(), source.load(), config=config, world=world)
    optimizer = build_optimizer(policy.model, config)
    for parameter in policy.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def save(run: Path) -> Any:
        return save_checkpoint(run, 1, policy=policy, optimizer=optimizer, state={"step": 1}, world=world)

    def load() -> Any:
        return load_checkpoint(output / "run" / "checkpoint-1", policy=policy, optimizer=optimizer, world=world)

    copies: list[bool] = []

    def told(call: Callable[[], Any]) -> str:
        try:
            return f"gave {call()}"
        except Exception as error:
            copies.append(hasattr(error, "told_elsewhere"))
            return f"{type(error).__name__}: {error}"

    def too_large() -> None:
        raise MemoryError("no memory")

    def unreadable() -> None:
        raise OSError("stale handle")

    found = {"saved": told(lambda: save(output / "run")), "loaded": told(load)}
    found["apart"] = told(lambda: save(output / f"apart {world.rank}"))
    found["left apart"] = str(sorted(path.name for path in output.glob("apart 0/*")))
    if world.rank == 1:
        (output / "blocked 1").touch()
    found["blocked"] = told(lambda: save(output / f"blocked {world.rank}"))
    found["blocked is a copy"] = str(copies[-1])
    for name, stumble in {"too large": too_large, "unreadable": unreadable}.items():
        policy.stumble = stumble
        found[name] = told(load)
    policy.stumble = lambda: os._exit(7)
    answers = output / f"rank-{world.rank}.json"
    answers.write_text(json.dumps(found), encoding="utf-8")
    found["lost"] = told(load)
    answers.write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)  # the process group cannot be left in order any more
