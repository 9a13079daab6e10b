"""What bounds any forecaster on runs that rise: figures for a target that is not met.

Which runs rise is known in hindsight only, and so is how the forecasters at hand would best be mixed. Three figures say what
such knowledge would be worth: the law told beforehand that a run rises; the fixed mixture of all forecasters' guesses that errs
least on the very curves that it is judged on, which no stacking with fixed shares can beat; and the same mixture chosen on all
repositories but the one that it is judged on, as one would have had to.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import linprog

from benchmarks.law.curves import Array, Curve
from benchmarks.law.evaluate import LEVEL, Record, evaluate, table
from benchmarks.law.models import Law
from benchmarks.law.results import rounded
from grpo_fast.law.fitting import weight_by_source

_LEAST_SHARE = 0.01


def limits(records: Sequence[Record], curves: Sequence[Curve], law: Law) -> dict[str, Any]:
    """Errors of the level on runs that rise, in the unit and the weights of the tables.

    Args:
        records: of all forecasters.
        curves: that were judged.
        law: whose prior is fitted anew, on rising curves of other repositories alone.

    Returns:
        ``told``: error at each share seen of the law that was told; ``mixture``: for each share, the error of the best fixed
        mixture and its weights, and ``elsewhere``, the error of the mixtures chosen without the repository judged. Empty where
        no curve rises.
    """
    rising = [curve for curve in curves if curve.learning]
    if not rising:
        return {}
    shares = sorted({record.share for record in records})
    told = table(evaluate([law], rising, shares=shares))[law.name]
    chosen = [record for record in records if record.target == LEVEL and record.curve.learning]
    return {
        "told": [rounded(value) for value in told],
        "mixture": [best_mixture([record for record in chosen if record.share == share]) for share in shares],
    }


def best_mixture(records: Sequence[Record]) -> dict[str, Any]:
    """The convex weights of forecasters whose mixed guess has the least pooled error on these records: a linear programme."""
    signed: dict[str, dict[str, float]] = defaultdict(dict)
    repository = {}
    for record in records:
        signed[record.forecaster][record.curve.name] = record.signed
        repository[record.curve.name] = record.curve.repository
    names, runs = list(signed), list(repository)
    matrix = np.array([[signed[name][run] for name in names] for run in runs])
    sources = np.array([repository[run] for run in runs])
    error, mix = _least_absolute(matrix, _even(sources))
    shares = {name: rounded(float(share)) for name, share in zip(names, mix, strict=True) if share >= _LEAST_SHARE}
    return {"error": rounded(error), "weights": shares, "elsewhere": rounded(_elsewhere(matrix, sources))}


def _elsewhere(signed: Array, sources: Array) -> float:
    """Pooled error of mixtures that were chosen without the source they are judged on; NaN with one source."""
    names = np.unique(sources)
    if names.size < 2:
        return math.nan
    errors = []
    for name in names:
        own = sources == name
        _, mix = _least_absolute(signed[~own], _even(sources[~own]))
        errors.append(np.abs(signed[own] @ mix).mean())
    return float(np.mean(errors))


def _even(sources: Array) -> Array:
    """Weights that sum to 1, every source's the same."""
    weight = weight_by_source(sources.tolist())
    return weight / weight.sum()


def _least_absolute(signed: Array, weight: Array) -> tuple[float, Array]:
    """Least ``weight @ |signed @ mix|`` over mixtures, and the mixture; ``signed`` is (runs, forecasters)."""
    num_runs, num_names = signed.shape
    bound = np.concatenate([np.hstack([signed, -np.eye(num_runs)]), np.hstack([-signed, -np.eye(num_runs)])])
    found = linprog(
        np.concatenate([np.zeros(num_names), weight]),
        A_ub=bound,
        b_ub=np.zeros(2 * num_runs),
        A_eq=np.concatenate([np.ones(num_names), np.zeros(num_runs)])[None],
        b_eq=[1.0],
    )
    if found.x is None:
        raise RuntimeError(f"no mixture was found: {found.message}")
    return float(found.fun), np.asarray(found.x[:num_names])
