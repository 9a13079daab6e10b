"""Does the law stop the embedded run in time, and what does stopping cost?

Each seed is trained over its whole budget with the forecast only listening; the held-out accuracy is taken where it would have
stopped and at the end. Stopping changes nothing before the stop, so the run that stops is a prefix of this one. Run
``python benchmarks/system/embedded_run.py --output benchmarks/results/cpu/embedded_run.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from grpo_fast import GRPOTrainer, recipe
from grpo_fast.device import device_facts, package_version


def full_budget_run(seed: int) -> dict[str, Any]:
    """Trains one seed to the end of its budget.

    Returns:
        Accuracies (greedy, held out) before, at the forecast's stop and at the end; steps; seconds; the reason in words.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = recipe("embedded", seed=seed, output_dir=Path(folder) / "run", sinks=(), forecast="warn", report=False)
        stop: dict[str, Any] = {}
        rewards = []
        begun = time.perf_counter()
        with GRPOTrainer(config) as trainer:
            initial = trainer.evaluate()
            for step in trainer.steps():
                rewards.append(round(step.metrics["reward"], 4))
                if not stop and step.decision is not None and step.decision.stop:
                    seconds = time.perf_counter() - begun
                    stop = {
                        "step": step.step,
                        "accuracy": trainer.evaluate(),
                        "seconds": seconds,
                        "reason": step.decision.reason,
                        "flops": step.metrics["flops"],
                    }
            final = trainer.evaluate()
            flops = trainer.summary["compute"]["flops"]
        return {
            "seed": seed,
            "max_steps": config.max_steps,
            "initial_accuracy": initial,
            "stop": stop,
            "final_accuracy": final,
            "flops": flops,
            "seconds": time.perf_counter() - begun,
            "reward": rewards,
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    result = {
        "device": device_facts().as_dict(),
        "versions": {name: package_version(name) for name in ("torch", "transformers", "grpo-fast")},
        "runs": [full_budget_run(seed) for seed in range(options.seeds)],
    }
    for run in result["runs"]:
        print({key: value for key, value in run.items() if key != "reward"})
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
