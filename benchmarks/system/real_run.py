"""A real run until the law stops it, and what the whole budget would have reached: SmolLM2-135M-Instruct on GSM8K.

    python -m benchmarks.system.real_run runs/real --dataset gsm8k:GSM8K_DIRECTORY

One command, given again and again: a piece ends after ``--minutes`` with a checkpoint, and the next goes on from there with the
same trace. The forecast only listens, so that training goes on behind the step at which it would have stopped: held-out
accuracy is taken before, there and at the end of the budget. ``--until law`` ends with the stop instead, with what was then
foretold of the end. When the run is over, its report, curves and numbers go to ``benchmarks/results/<device>/real_run/``.
Without ``--model`` the weights are those of :mod:`benchmarks.system.smollm2`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.ops import store
from benchmarks.system.needed import absent_dependencies
from benchmarks.system.smollm2 import export_smollm2
from grpo_fast import Config, GRPOTrainer
from grpo_fast.config import read_toml
from grpo_fast.device import device_facts, versions
from grpo_fast.report import write_report
from grpo_fast.train import StepResult
from grpo_fast.train.parts import CONFIG_FILE

MEASURED_FILE = "real_run.json"
_KEPT = ("report.html", "summary.json", "metrics.jsonl", "config.toml", MEASURED_FILE)
_SETTINGS: dict[str, Any] = {
    "prompts_per_step": 32,
    "num_generations": 8,
    "max_completion_length": 256,
    "learning_rate": 3e-6,
    "warmup_steps": 10,
    "max_steps": 400,
    "share_prompts": True,
    "reward_range": (0.0, 1.0),
    "eval_size": 256,
    "save_steps": 10,
    "save_total_limit": 1,
}


def piece(config: Config, *, seconds: float, until: str = "end") -> dict[str, Any]:
    """Begins a run or goes on with it, for so long.

    Args:
        config: of the run; one that is there already keeps its own.
        seconds: after which no further step begins.
        until: ``end`` of the budget, or the ``law``'s stop.

    Returns:
        What is known: ``start``, ``stop`` and ``end``, each with step and held-out accuracy, as far as the run has come, and
        whether it is ``over``.
    """
    deadline = time.monotonic() + seconds
    run = config.output_dir
    begun = (run / CONFIG_FILE).is_file()
    with GRPOTrainer.resume(run) if begun else GRPOTrainer(config) as trainer:
        found = _read(run)
        if "start" not in found:
            found["start"] = {"step": trainer.global_step, "accuracy": trainer.evaluate()}
        for step in trainer.steps():
            if "stop" not in found and step.decision is not None and step.decision.stop:
                found["stop"] = _stop(step) | {"accuracy": trainer.evaluate()}
            _write(run, found)  # a piece that is killed must not leave the start to the next one, which begins later
            if time.monotonic() > deadline or (until == "law" and "stop" in found):
                break
        last = trainer.global_step == trainer.config.max_steps
        found["over"] = last or (until == "law" and "stop" in found)
        if last:
            found["end"] = {"step": trainer.global_step, "accuracy": trainer.evaluate()}
        _write(run, found)
    return found


def _stop(step: StepResult) -> dict[str, Any]:
    """What the law said when it would have stopped."""
    assert step.decision is not None
    assert step.forecast is not None
    told = step.forecast
    return {
        "step": step.step,
        "reason": step.decision.reason,
        "flops": step.metrics["flops"],
        "foretold_reward_at_the_end": {"low": told.low, "median": told.median, "high": told.high},
    }


def _read(run: Path) -> dict[str, Any]:
    file = run / MEASURED_FILE
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _write(run: Path, found: dict[str, Any]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    scratch = run / f".{MEASURED_FILE}"
    scratch.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    scratch.replace(run / MEASURED_FILE)


def publish(run: Path, target: Path, *, note: str = "") -> None:
    """Writes the report of a run that is over, copies what is worth keeping, and says where it comes from.

    Args:
        run: its directory.
        target: where the copies go.
        note: what somebody who looked at it has to say of it.
    """
    write_report(run)
    target.mkdir(parents=True, exist_ok=True)
    places = _places(run)
    for name in _KEPT:
        text = (run / name).read_text(encoding="utf-8")
        for place in places:
            text = text.replace(place, "")
        (target / name).write_text(text, encoding="utf-8")
    shutil.copytree(run / "plots", target / "plots", dirs_exist_ok=True)
    origin = {"device": device_facts().as_dict(), "versions": versions(), "commit": store.commit(), "date": store.today()}
    _write(target, _read(run) | origin | ({"note": note} if note else {}))


def _places(run: Path) -> list[str]:
    """Where on this machine the run and its model lie, which is nobody else's business."""
    paths = (run.resolve(), Path(read_toml(run / CONFIG_FILE)["model"]))
    return [f"{path.parent}/" for path in paths if path.is_absolute()]


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 when the run is over, and 3 while the command has to be given again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, help="of the run")
    parser.add_argument("--model", help="directory or hub id, in place of SmolLM2-135M-Instruct")
    parser.add_argument("--dataset", default="gsm8k", help="as of the configuration: gsm8k:DIRECTORY, reasoning_gym:TASK, ...")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which a piece begins no further step")
    parser.add_argument("--until", choices=("end", "law"), default="end")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other settings of a new run, as JSON")
    parser.add_argument(
        "--output", type=Path, help="instead of benchmarks/results/<device>/real_run, as where the tree is not kept"
    )
    parser.add_argument("--note", default="", help="what to say of the run beside its numbers, once it is over")
    options = parser.parse_args(arguments)
    if absent := absent_dependencies():  # rewards are judged, and reports written, only after much has been computed
        raise SystemExit(f"not installed: pip install {' '.join(absent)}")
    model = options.model
    if model is None:
        model = str(options.directory.with_name("SmolLM2-135M-Instruct"))
        if not Path(model).is_dir():
            export_smollm2(Path(model))
    given = {name: json.loads(value) for name, _, value in (entry.partition("=") for entry in options.set)}
    fixed = {"model": model, "dataset": options.dataset, "output_dir": options.directory, "forecast": "warn"}
    found = piece(Config.parse(_SETTINGS | given | fixed), seconds=60 * options.minutes, until=options.until)
    print(json.dumps(found, indent=1))
    if not found["over"]:
        print("not over yet: give the same command again")
        return 3
    publish(options.directory, options.output or store.default_path(device_facts()).with_name("real_run"), note=options.note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
