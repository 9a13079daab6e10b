"""Makes the prior that ships with the package: ``python -m benchmarks.law.fit_prior [FOLDER]``.

Fits on every curve of the folder and writes what is fitted to ``grpo_fast/law/default_prior.json``, with the figures that a
prior fitted on all other repositories reaches on each repository: what a stranger's run may expect. No row of the curves goes
into the package, only the fitted tables.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.law.__main__ import SHARED
from benchmarks.law.curves import Curve, load_curves, repositories
from benchmarks.law.evaluate import SHARES, Record, evaluate, table
from benchmarks.law.models import Law
from grpo_fast.law import Prior
from grpo_fast.law.fitting import fit_witnesses

OUTPUT = Path(__file__).parents[2] / "grpo_fast" / "law" / "default_prior.json"


def fitted(curves: Sequence[Curve], law: Law) -> Prior:
    """The prior of all the curves, with where it comes from."""
    prior = fit_witnesses(law.witnesses(curves))
    records = evaluate([law], curves)
    about = {
        "curves": len(curves),
        "repositories": len(repositories(curves)),
        "left out, repository by repository": figures(records, law.name),
    }
    return dataclasses.replace(prior, about=about)


def figures(records: Sequence[Record], name: str) -> dict[str, Any]:
    """Error of the level over the last 20 % (unit: smoothed range), and how often the 90 % interval held it."""
    rounded = {
        "share of the run seen": list(SHARES),
        "level error, all": table(records)[name],
        "level error, learning": table(records, chosen=lambda curve: curve.learning)[name],
        "held by the 90 % interval, all": table(records, measure="inside90")[name],
    }
    return {what: [round(value, 3) for value in values] for what, values in rounded.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=SHARED)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    prior = fitted(load_curves(options.folder), Law())
    prior.save(options.output)
    for what, value in prior.about["left out, repository by repository"].items():
        print(f"{what:34s}", value)


if __name__ == "__main__":
    main()
