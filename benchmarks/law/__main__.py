"""Judges forecasters on a folder of curves: ``python -m benchmarks.law FOLDER``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.law.baselines import BASELINES
from benchmarks.law.curves import load_curves, repositories
from benchmarks.law.evaluate import FINAL, LEVEL, evaluate, table
from benchmarks.law.models import Law

SHARED = Path(__file__).parents[3] / "shared" / "data" / "reward_curves"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=SHARED)
    parser.add_argument("--only", default="", help="part of the names of the forecasters to run")
    parser.add_argument("--all-duplicates", action="store_true", help="keep near-duplicate curves")
    options = parser.parse_args()
    curves = load_curves(options.folder, distinct=not options.all_duplicates)
    chosen = [forecaster for forecaster in (*BASELINES, Law()) if options.only in forecaster.name]
    print(f"{len(curves)} curves of {len(repositories(curves))} repositories")
    begun = time.perf_counter()
    records = evaluate(chosen, curves, told=lambda name: print(f"{time.perf_counter() - begun:6.1f} s  {name}"))
    for title, subset in (("all", lambda _: True), ("learning", lambda curve: curve.learning)):
        rows = table(records, chosen=subset)
        print(f"\nlevel error / smoothed range, {title}: seen 20/40/60/80 %")
        for name, values in rows.items():
            print(f"{name:46s} " + " ".join(f"{value:.3f}" for value in values))
    for target in (LEVEL, FINAL):
        for measure in ("error", "crps", "inside50", "inside90", "width90", "log_score"):
            rows = table(records, measure=measure, target=target)
            for name, values in rows.items():
                if values[0] == values[0] and "law" in name:
                    print(f"{target} {measure:10s} {name:30s} " + " ".join(f"{value:.3f}" for value in values))


if __name__ == "__main__":
    main()
