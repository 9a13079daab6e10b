"""Runs of the trainer on the device that is not there, and what was seen of them.

    python -m tests.cuda_on_host.train LIBRARY CONFIGURATIONS

Configurations are a JSON list of settings. What is printed is JSON too: what the device refused, and of each run metrics,
kernels, calls, waits and memory of the host that was pinned.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cuda_on_host.torch_device import Device, load


def share_of_vowels(completions: list[str], **_: Any) -> list[float]:
    """A reward that completions of a model with random weights tell apart."""
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def trained(device: Device, settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    from grpo_fast import Config, GRPOTrainer
    from grpo_fast.train import offload

    offload._LEAST_BYTES = 2**8  # what a tiny model keeps is small
    device.launched.clear()
    device.varlen.clear()
    device.waits.clear()
    device.pinned.clear()
    steps, waits = [], []
    device.be_of(*settings.pop("capability", (9, 0)))
    with GRPOTrainer(Config.parse(settings)) as trainer:
        for step in trainer.steps():
            steps.append(dict(step.metrics))
            waits.append(dict(device.waits))
            device.waits.clear()
        layout = trainer._parts.policy.layout
        operands = str(trainer._parts.policy.head(1.0).operand_dtype)
    return {
        "steps": steps,
        "layout": layout,
        "operands": operands,
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "kernels": sorted(device.launched),
        "varlen": len(device.varlen),
        "waits": waits,
        "pinned": len(device.pinned),
    }


def refusals(device: Device) -> list[str]:
    """What a GPU would not do either."""
    import torch

    from grpo_fast import Config
    from grpo_fast.ops import token_logprob
    from grpo_fast.ops.lm_head import LMHead
    from grpo_fast.train.policy_source import check_dtype

    here, there = torch.ones(2, 16), torch.ones(2, 16, device="cuda")
    targets = torch.zeros(2, dtype=torch.int64)
    attempts: dict[str, Callable[[], object]] = {
        "a sum of both": lambda: there + here,
        "a change from the host": lambda: there.mul_(here),
        "numbers of both in one": lambda: torch.stack([there.sum(), here.sum()]),
        "an array": there.numpy,
        "a kernel": lambda: token_logprob(there, LMHead(there), targets=targets, impl="triton"),
        "bfloat16": lambda: check_dtype(Config(dtype="bfloat16")),
    }
    told = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except (RuntimeError, TypeError, ValueError):
            told.append(name)
    device.be_of(7, 5)
    try:
        attempts["bfloat16"]()
    except ValueError as error:
        told.append(str(error))
    return told


def main() -> None:
    library, configurations = sys.argv[1:]
    load(Path(library))
    device = Device()
    found = {"refused": refusals(device), "runs": [trained(device, settings) for settings in json.loads(configurations)]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
