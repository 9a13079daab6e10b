"""Judges the law and its rivals on a folder of curves and on simulated runs: ``python -m benchmarks.law [FOLDER]``.

Prints the tables; ``--output`` writes them as JSON, with pictures. ``--only TEXT`` judges the forecasters and rules whose name
holds it, for a quick look while a model is being changed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.law import pictures, results
from benchmarks.law.baselines import BASELINES
from benchmarks.law.cost import cost_ms
from benchmarks.law.curves import Curve, averaged, load_curves
from benchmarks.law.evaluate import FINAL, LEVEL, SHARES, evaluate
from benchmarks.law.limits import limits
from benchmarks.law.models import Law
from benchmarks.law.residuals import Residual
from benchmarks.law.simulator import STORIES, simulate
from benchmarks.law.stopping import Fixed, LawStop, Oracle, Patience, PlugIn, Stopper, replay
from grpo_fast.law import Prior

SHARED = Path(__file__).parents[3] / "shared" / "data" / "reward_curves"
DEFAULT = 0.78
CONFIDENCES = (0.6, 0.7, 0.78, 0.85, 0.9, 0.95)
NUM_SIMULATED, FIRST_SEED = 120, 10_000
_PLUGGED = ("exponential from zero (v2)", "logistic (v1)", "exponential + R0")


def stoppers(law: Law) -> list[Stopper]:
    """Every rule that is compared."""
    fits = {baseline.name: baseline for baseline in BASELINES}
    plain: list[Stopper] = [Oracle(), *map(Fixed, (0.4, 0.6, 0.8)), *map(Patience, (0.1, 0.2))]
    return [*plain, *(PlugIn(fits[name]) for name in _PLUGGED), *(LawStop(law, confidence) for confidence in CONFIDENCES)]


def judged(curves: Sequence[Curve], law: Law, *, only: str = "", stopping: bool = True) -> dict[str, Any]:
    """All figures of one set of curves.

    Args:
        curves: the set.
        law: the law that is judged.
        only: judge what has this in its name, beside the law's name and the oracle.
        stopping: whether stops are replayed too.
    """
    begun = time.perf_counter()

    def told(name: str) -> None:
        print(f"{time.perf_counter() - begun:6.1f} s  {name}", flush=True)

    forecasters = [one for one in (*map(Residual, BASELINES), law) if only in one.name]
    records = evaluate(forecasters, curves, told=told)
    out: dict[str, Any] = {
        "about": results.about(curves),
        "shares": list(SHARES),
        "forecasts": results.forecast_tables(records),
    }
    if not only:
        out["against_best"] = {measure: results.against_best(records, law.name, measure) for measure in ("error", "crps")}
        out |= {"floor": results.floor(curves), "by_rise_seen": results.by_rise_seen(records)}
        out["limits"] = limits(records, curves, law)
        out["by_repository"] = results.by_repository(records, ("mean of last 20 % seen", "exponential + R0", law.name))
    if stopping:
        rules = [rule for rule in stoppers(law) if only in rule.name or isinstance(rule, Oracle)]
        out["stopping"] = results.stopping_tables(replay(rules, curves, told=told))
    return out | {"seconds": round(time.perf_counter() - begun, 1)}


def printed(found: dict[str, Any]) -> None:
    """The tables as text."""
    for group in [group for group in ("all", "learning") if group in found["forecasts"]]:
        print(f"\nlevel error / smoothed range, {group} ({found['forecasts'][group]['curves']} curves)")
        for name, figures in found["forecasts"][group][LEVEL]["error"].items():
            print(f"  {name:46s}" + " ".join(f"{value[0]:.3f} [{value[1]:.2f} {value[2]:.2f}]  " for value in figures))
    for target in (LEVEL, FINAL):
        for measure in results.FORECAST_MEASURES:
            print(f"\n{measure} of the {target}")
            for name, figures in found["forecasts"]["all"][target][measure].items():
                print(f"  {name:46s}" + " ".join(f"{value[0]:.3f}" if value[0] is not None else "  -  " for value in figures))
    print("\nerror of one who knows the mean curve:", found.get("floor"))
    print("on runs that rise, told so, and the best mixture in hindsight:", found.get("limits"))
    for row in found.get("by_rise_seen", {}).get("rows", ()):
        print("  rise seen", " ".join(f"{name} {value}" for name, value in row.items()))
    for row in found.get("targets", ()):
        print(f"{'met ' if row['met'] else 'MISS'}  {row['target']}: {row['value']} in {row['bounds']}")
    for group, rows in found.get("stopping", {}).items():
        print(f"\nstops, {group} ({rows['curves']} curves)")
        for name, row in rows.items():
            if name != "curves":
                shown = ("saved", "share_of_oracle", "lost", "false", "bad", "surely_false", "missed")
                plain = f"  per run: saved {row['per_run']['saved']} false {row['per_run']['false']}"
                print(f"  {name:42s}" + "  ".join(f"{part} {row[part][0]}" for part in shown) + plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=SHARED)
    parser.add_argument("--only", default="", help="part of the names to judge")
    parser.add_argument("--all-duplicates", action="store_true", help="keep near-duplicate curves")
    parser.add_argument("--no-stopping", action="store_true")
    parser.add_argument("--simulated", type=int, default=None, metavar="N", help="judge N simulated runs instead of a folder")
    parser.add_argument("--noiseless", action="store_true", help="judge the known means of simulated runs")
    parser.add_argument(
        "--smoothed", type=float, metavar="KEEP", help="judge moving averages that keep so much of their past, as exports do"
    )
    parser.add_argument("--output", type=Path, help="folder for JSON and pictures; both test beds are judged")
    options = parser.parse_args()
    law = Law()
    if options.output is not None:
        written(options.folder, law, options.output)
        return
    if options.simulated is not None:
        curves = [simulate(FIRST_SEED + seed) for seed in range(options.simulated)]
    else:
        curves = load_curves(options.folder, distinct=not options.all_duplicates)
    if options.noiseless:
        curves = [curve if curve.mean is None else replace(curve, rewards=curve.mean) for curve in curves]
    if options.smoothed is not None:
        curves = [averaged(curve, options.smoothed) for curve in curves]
    if options.noiseless or options.smoothed is not None:
        law = Law(prior=Prior.default())  # it has seen raw rewards alone, as has anybody's who forecasts such a log
    printed(judged(curves, law, only=options.only, stopping=not options.no_stopping))


def written(folder: Path, law: Law, output: Path) -> None:
    """Both test beds, judged in full, as JSON and pictures."""
    output.mkdir(parents=True, exist_ok=True)
    simulated = [simulate(FIRST_SEED + seed) for seed in range(NUM_SIMULATED)]
    where = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in ("numpy", "scipy")}
    for name, curves in (("published", load_curves(folder)), ("simulated", simulated)):
        found = judged(curves, law)
        found |= {
            "law": law.name,
            "stop_rule": f"{law.name}, {DEFAULT:g}",
            "targets": results.targets(found, law.name, DEFAULT),
            "cost_ms": cost_ms(),
            "versions": where,
        }
        printed(found)
        (output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        pictures.errors(found["forecasts"], SHARES, law.name, output / f"{name}_error.png")
        pictures.coverage(found["forecasts"], SHARES, law.name, output / f"{name}_coverage.png")
        pictures.stops(found["stopping"], law.name, output / f"{name}_stops.png")
    pictures.examples(typical(simulated), law, output / "simulated_examples.png")


def typical(runs: Sequence[Curve]) -> list[Curve]:
    """One run of each story, with the shape that the story is about where any has it."""
    wanted = {"plain": "concave", "format first": "S-shaped", "hard part later": "second rise"}
    told = [[run for run in runs if run.task == story] for story in STORIES]
    return [next((run for run in some if run.shape == wanted.get(run.task)), some[0]) for some in told if some]


if __name__ == "__main__":
    main()
