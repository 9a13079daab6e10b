"""Whole steps on a GPU beside TRL's and Unsloth's: ``python -m benchmarks.device steps``.

Each trainer takes the steps of a case in a process of its own, with the same model, completions, micro-batches and optimiser;
the peak of its memory is that process's. Where a case does not sample, both trainers are given the same completions of random
tokens, so that what differs is the training alone. ``benchmarks/results/<device>/steps.json`` is rewritten after every case,
with what is asked of it and whether that is met. What the time budget does not reach is listed; ``--resume`` measures that
later, ``--cases`` chooses. ``--smoke`` takes all cases in miniature on the CPU, in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops import store
from benchmarks.system.device_cases import CASES, StepCase, model_directory, targets
from benchmarks.system.needed import absent_dependencies
from grpo_fast.device import device_facts, package_version

TRAINERS = ("grpo_fast", "trl", "unsloth")
_RESULT = "RESULT "
_NEEDED: dict[str, tuple[str, ...]] = {"full": (), "lora": ("peft",), "qlora": ("peft", "bitsandbytes")}
"""Packages by what is trained, beside those that the project itself asks for."""


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where one of this project's steps fails; 0 otherwise."""
    options = _parser().parse_args(arguments)
    chosen = [case for case in CASES if not options.cases or case.name in options.cases]
    unknown = set(options.cases) - {case.name for case in CASES}
    if unknown:
        raise SystemExit(f"no case {', '.join(sorted(unknown))}; there are: {', '.join(case.name for case in CASES)}")
    if options.worker:
        print(_RESULT + json.dumps(run_trainer(chosen[0], options.worker, options.models, smoke=options.smoke)), flush=True)
        os._exit(0)  # a trainer that is left as it ends would write a checkpoint of the whole model
    if not options.smoke and not torch.cuda.is_available():
        raise SystemExit("these steps are for a GPU, and torch sees none; --smoke takes them in miniature on the CPU")
    facts = device_facts("cpu" if options.smoke else "cuda")
    path = options.output or (None if options.smoke else store.default_path(facts).with_name("steps.json"))
    before = store.read(path)["cases"] if options.resume and path is not None and path.exists() else []
    header = {"device": facts.as_dict(), "machine": options.machine}
    kept = None if path is None else store.Store(path, header, keep=before)
    deadline, failed = time.monotonic() + options.budget, False
    for number, case in enumerate(chosen):
        if kept is not None and case.name in kept.done:
            continue
        left = deadline - time.monotonic()
        if number and not options.smoke and case.seconds > left:
            print(f"{case.name}: left out, {left:.0f} s left")
            if kept is not None:
                kept.leave_out(case.name, f"about {case.seconds:.0f} s, {left:.0f} s of the budget were left")
            continue
        record = _measure(case, options, deadline)
        failed = failed or record["rows"]["grpo_fast"]["status"] not in {"ok", "missing"}
        _tell(record)
        if kept is not None:
            kept.add(record, of={"commit": store.commit(), "date": store.today()})
    if kept is not None:
        kept.write()
    return int(failed)


def _measure(case: StepCase, options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for trainer in TRAINERS:
        reason = missing(case, trainer, smoke=options.smoke)
        if reason:
            rows[trainer] = {"status": "missing", "reason": reason}
        elif options.smoke:
            rows[trainer] = run_trainer(case, trainer, options.models, smoke=True)
        else:
            rows[trainer] = in_a_process(case, trainer, options.models, timeout_s=max(1.0, deadline - time.monotonic()))
    size = case.smoke() if options.smoke else case
    asked = targets(case, {} if options.smoke else rows)  # in miniature they say nothing
    return {"case": case.name, "layout": case.layout, "tokens": size.tokens, "rows": rows, "targets": asked}


def missing(case: StepCase, trainer: str, *, smoke: bool) -> str:
    """Why a trainer cannot take part in a case; empty where it can."""
    needed = {"trl": ("trl",), "unsloth": ("unsloth", "trl")}.get(trainer, ()) + _NEEDED[case.weights]
    # Every trainer's case is put up by this project, so that what it asks for is asked of all of them.
    absent = [*absent_dependencies(), *(name for name in needed if find_spec(name) is None)]
    if absent:
        return f"not installed: pip install {' '.join(absent)}"
    return "Unsloth needs a GPU" if trainer == "unsloth" and smoke else ""


def in_a_process(case: StepCase, trainer: str, models: Path, *, timeout_s: float, smoke: bool = False) -> dict[str, Any]:
    """What :func:`run_trainer` gives in a process of its own, or how that ended: failed, or out of memory."""
    command = [sys.executable, "-m", "benchmarks.system.device_steps", "--worker", trainer, "--cases", case.name]
    command += ["--smoke"] if smoke else []
    try:
        done = subprocess.run(
            [*command, "--models", str(models)], capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"not done after the {timeout_s:.0f} s that the budget left"}
    told = next((line for line in reversed(done.stdout.splitlines()) if line.startswith(_RESULT)), None)
    if told is not None:
        row: dict[str, Any] = json.loads(told.removeprefix(_RESULT))
        return row
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    memory = next((line for line in lines if "out of memory" in line), None)
    return {"status": "out of memory" if memory else "failed", "reason": (memory or lines[-1])[:300]}


def run_trainer(case: StepCase, trainer: str, models: Path, *, smoke: bool) -> dict[str, Any]:
    """Takes a case's steps with one trainer.

    Args:
        case: which; made small where ``smoke`` says so.
        trainer: of :data:`TRAINERS`.
        models: folder of model directories; what is missing in it is made.
        smoke: on the CPU, in miniature.

    Returns:
        Medians over all steps but the first: seconds of a step and of its phases, trained tokens a second; peak memory in GiB,
        and what the plan had said of it.
    """
    from benchmarks.system.device_trainers import STEPPERS, planned_gib  # noqa: PLC0415 (TRL takes seconds to import, and may be missing)

    warnings.simplefilter("ignore")
    directory, weights = model_directory(case.layout, models, smoke=smoke)
    case = case.smoke() if smoke else case
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        steps = STEPPERS[trainer](case, directory, Path(folder))
    kept = steps[1:]
    medians = {name: statistics.median(step[name] for step in kept) for name in kept[0]}
    return {
        "status": "ok",
        "weights": weights,
        **medians,
        "tokens_per_s": case.tokens / medians["step_s"],
        "peak_gib": _peak_gib(),
        **({"planned_gib": planned_gib(case, directory)} if trainer == "grpo_fast" else {}),
        "versions": {name: package_version(name) for name in ("torch", "transformers", trainer.replace("_", "-"))},
    }


def _peak_gib() -> float:
    """What was allocated on the GPU at most; on a CPU, what was resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def _tell(record: dict[str, Any]) -> None:
    for trainer, row in record["rows"].items():
        if row["status"] == "ok":
            told = f"{row['step_s']:.3f} s a step, {row['train_s']:.3f} s training, {row['peak_gib']:.2f} GiB"
        else:
            told = f"{row['status']}: {row['reason']}"
        print(f"{record['case']}, {trainer}: {told}", flush=True)
    for target in record["targets"]:
        value = "no number" if target["value"] is None else f"{target['value']:.2f}"
        met = {None: "open", True: "met", False: "not met"}[target["met"]]
        print(f"{record['case']}: {target['target']} {target['bound']:g}: {value}, {met}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.device steps", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="*", default=[], metavar="NAME", help=", ".join(case.name for case in CASES))
    parser.add_argument(
        "--smoke", action="store_true", help="all cases in miniature on the CPU, nothing written without --output"
    )
    parser.add_argument("--budget", type=float, default=450.0, help="seconds for everything")
    parser.add_argument("--resume", action="store_true", help="keep the cases of an earlier run")
    parser.add_argument(
        "--output", type=Path, help="instead of benchmarks/results/<device>/steps.json, as where the tree is not kept"
    )
    parser.add_argument(
        "--models", type=Path, default=Path(tempfile.gettempdir()) / "grpo-fast-models", help="where models are put"
    )
    parser.add_argument("--machine", default="", help="what else to say of the machine: shared, clocks locked, ...")
    parser.add_argument("--worker", choices=TRAINERS, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
