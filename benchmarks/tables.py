"""Writes the generated tables of the README from ``benchmarks/results``; ``--check`` only says whether they are up to date."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
README = ROOT / "README.md"
_TABLE = re.compile(r"(<!-- table: [^\n]*-->\n).*?(<!-- table end -->)", re.DOTALL)


def readme_table() -> str:
    """The first screen's table: what the embedded run does on a CPU, and what a step costs beside TRL."""
    embedded, steps = _read("cpu/embedded_run.json"), _read("cpu/step_time.json")
    runs = embedded["runs"]
    kept = [run["stop"]["accuracy"] / run["final_accuracy"] for run in runs]
    ours, theirs = (1e3 * steps[name]["p50"] for name in ("grpo_fast_step_s", "trl_step_s"))
    cores = embedded["device"]["num_cores"]
    rows = [
        ("held-out accuracy before training", f"{mean(run['initial_accuracy'] for run in runs):.2f}"),
        (
            "stopped by the forecast at step",
            ", ".join(str(run["stop"]["step"]) for run in runs) + f" of {runs[0]['max_steps']}",
        ),
        ("accuracy there", ", ".join(f"{run['stop']['accuracy']:.3f}" for run in runs)),
        ("accuracy after the whole budget", ", ".join(f"{run['final_accuracy']:.3f}" for run in runs)),
        ("share of it kept, worst seed", f"{min(kept):.3f}"),
        ("FLOPs saved, mean", f"{mean(1 - run['stop']['flops'] / run['flops'] for run in runs):.0%}"),
        (
            "median step, ours / TRL " + steps["versions"]["trl"],
            f"{ours:.0f} ms / {theirs:.0f} ms ({steps['median_ratio_trl_over_ours']:.1f}x)",
        ),
    ]
    head = f"| embedded model, {cores} CPU cores, torch {embedded['versions']['torch']} | seeds 0, 1, 2 |\n|---|---|\n"
    return head + "".join(f"| {name} | {value} |\n" for name, value in rows)


def rendered_readme() -> str:
    """The README with its table as the results have it."""
    text = README.read_text(encoding="utf-8")
    return _TABLE.sub(lambda match: match[1] + readme_table() + match[2], text)


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        sys.exit(rendered_readme() != README.read_text(encoding="utf-8"))
    README.write_text(rendered_readme(), encoding="utf-8")
