"""Reward curves to be judged on: any folder of logs, or one with an ``index.csv`` that says where each curve came from.

Two things are taken from the collection's own convention, so that figures can be compared: the *smoothed range* (the span of a
moving average over a twelfth of the points, mirrored at both ends), and weighting by repository.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d

from benchmarks.law.hindsight import Hindsight, classify, known_mean, look_back
from grpo_fast.integrations.logs import LogError, read_log

Array = NDArray[np.float64]

INDEX = "index.csv"
LOGS = (".csv", ".jsonl", ".json", ".log", ".txt")
SHAPES = ("concave", "S-shaped", "still rising", "second rise", "flat", "collapse")
RISING = frozenset(SHAPES[:4])
MAX_POINTS = 200
_FEWEST = 10
_COLUMNS = (
    *("id", "file", "source_repo", "kind", "unit_interval", "shape", "params_B", "group_size", "rollouts_per_point"),
    *("near_dup_cluster", "algo", "task"),
)


@dataclass(frozen=True)
class Curve:
    """One run's rewards and where they came from.

    Attributes:
        name: unique in its folder.
        repository: curves of one repository share their task, their code and often their data order.
        steps: (n,) ascending.
        rewards: (n,) finite.
        validation: whether these are held-out accuracies rather than training rewards.
        unit_interval: whether a reward is known to lie in [0, 1].
        label: shape as the collection labels it from the whole curve; empty where nothing says so.
        size_b: parameters of the model in 1e9; NaN where unknown.
        group_size: completions per prompt; 0 where unknown.
        rollouts: completions behind one point; 0 where unknown.
        cluster: curves of one cluster are near-duplicates of each other; empty where unknown.
        algorithm: as published, "LoRA" in it where adapters were trained.
        task: as published.
        clock: (n,) share of the budget's summed learning rate behind each step, where the schedule is known.
        mean: (n,) the mean reward without noise, where the run was simulated.
    """

    name: str
    repository: str
    steps: Array
    rewards: Array
    validation: bool = False
    unit_interval: bool = True
    label: str = ""
    size_b: float = math.nan
    group_size: int = 0
    rollouts: int = 0
    cluster: str = ""
    algorithm: str = ""
    task: str = ""
    clock: Array | None = None
    mean: Array | None = None

    @property
    def horizon(self) -> float:
        """Last step."""
        return float(self.steps[-1])

    @cached_property
    def smoothed(self) -> Array:
        """(n,) moving average over a twelfth of the points (odd, at least 3), mirrored at the ends."""
        return smoothed(self.rewards)

    @cached_property
    def smoothed_range(self) -> float:
        """Span of the moving average: the unit of the level error. 0 for a constant curve."""
        return float(np.ptp(self.smoothed))

    @property
    def reward_range(self) -> tuple[float, float] | None:
        """(0, 1) where that is known."""
        return (0.0, 1.0) if self.unit_interval else None

    @property
    def learning(self) -> bool:
        """Whether the whole curve, in hindsight, rises: neither flat nor in decline."""
        return self.shape in RISING

    @cached_property
    def hindsight(self) -> Hindsight:
        """The curve without its noise, in at most 200 points; exact where the mean is known."""
        few = thinned(self)
        return look_back(few.rewards) if few.mean is None else known_mean(few.mean)

    @cached_property
    def shape(self) -> str:
        """One of concave, S-shaped, second rise, still rising, flat, collapse: the collection's label where there is one.

        No collection labels second rises; they are looked for among those that rise.
        """
        own = classify(self.hindsight)
        labelled = _class(self.label)
        if not labelled or (own == "second rise" and labelled in RISING):
            return own
        return labelled

    @property
    def size_class(self) -> str:
        """Of the model: "up to 1B", "1B to 4B", "above 4B" or "unknown"."""
        if math.isnan(self.size_b):
            return "unknown"
        return "up to 1B" if self.size_b <= 1 else "1B to 4B" if self.size_b <= 4 else "above 4B"


def thinned(curve: Curve, most: int = MAX_POINTS) -> Curve:
    """The curve in at most ``most`` points: means of neighbours, each at the last of their steps."""
    size = curve.rewards.size
    if size <= most:
        return curve
    edges = np.linspace(0, size, most + 1).round().astype(int)
    count, last = np.diff(edges), edges[1:] - 1
    return replace(
        curve,
        steps=curve.steps[last],
        rewards=np.add.reduceat(curve.rewards, edges[:-1]) / count,
        rollouts=round(curve.rollouts * size / most),
        clock=None if curve.clock is None else curve.clock[last],
        mean=None if curve.mean is None else np.add.reduceat(curve.mean, edges[:-1]) / count,
    )


def smoothed(rewards: Array) -> Array:
    """The collection's moving average: a twelfth of the points, odd, at least 3, mirrored at the ends."""
    return np.asarray(uniform_filter1d(rewards, max(3, rewards.size // 12 | 1), mode="mirror"), dtype=np.float64)


def averaged(curve: Curve, keep: float) -> Curve:
    """The curve as smoothed exports have it: a moving average that keeps so much of its past, unbiased at its start."""
    sums, weights = 0.0, 0.0
    means = np.empty(curve.rewards.size)
    for index, reward in enumerate(curve.rewards.tolist()):
        sums, weights = keep * sums + reward, keep * weights + 1.0
        means[index] = sums / weights
    return replace(curve, rewards=means)


def load_curves(folder: str | Path, *, distinct: bool = True) -> list[Curve]:
    """Every curve of a folder.

    Args:
        folder: with an ``index.csv`` beside one CSV a run, or with any logs that ``grpo-fast forecast`` reads; then each
            subfolder counts as one repository, and a log that lies in the folder itself as its own.
        distinct: keep the first curve of each cluster of near-duplicates.

    Raises:
        FileNotFoundError: the folder does not exist or holds no curve of at least 10 rewards.
        ValueError: its ``index.csv`` lacks columns.
    """
    root = Path(folder)
    curves = list(_indexed(root) if (root / INDEX).is_file() else _logs(root))
    if not curves:
        raise FileNotFoundError(f"{root} holds no reward curve of at least {_FEWEST} rewards")
    if not distinct:
        return curves
    first: dict[tuple[str, str], Curve] = {}
    for curve in curves:
        first.setdefault((curve.repository, curve.cluster or f"name {curve.name}"), curve)
    return list(first.values())


def repositories(curves: Sequence[Curve]) -> list[str]:
    """Names in order of first appearance."""
    return list(dict.fromkeys(curve.repository for curve in curves))


def _indexed(root: Path) -> Iterator[Curve]:
    with (root / INDEX).open(encoding="utf-8") as handle:
        entries = list(csv.DictReader(handle))
    missing = sorted(set(_COLUMNS) - set(entries[0] if entries else ()))
    if missing:
        raise ValueError(
            f"{root / INDEX} is no index of curves: it lacks {', '.join(missing)}; name it otherwise to read the logs"
        )
    for entry in entries:
        with (root / entry["file"]).open(encoding="utf-8") as handle:
            rows = [(float(row["step"]), float(row["reward"] or "nan")) for row in csv.DictReader(handle)]
        steps, rewards = np.array(rows).T
        known = np.isfinite(rewards)
        if known.sum() < _FEWEST:
            continue
        yield Curve(
            name=entry["id"],
            repository=entry["source_repo"],
            steps=steps[known],
            rewards=rewards[known],
            validation=entry["kind"].startswith("validation"),
            unit_interval=entry["unit_interval"] == "1",
            label=entry["shape"],
            size_b=float(entry["params_B"] or "nan"),
            group_size=int(float(entry["group_size"] or 0)),
            rollouts=int(float(entry["rollouts_per_point"] or 0)),
            cluster=entry["near_dup_cluster"],
            algorithm=entry["algo"],
            task=entry["task"],
        )


def _logs(root: Path) -> Iterator[Curve]:
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; give the folder that holds the curves")
    for path in sorted(path for path in root.rglob("*") if path.suffix in LOGS and path.is_file()):
        try:
            log = read_log(path)
        except LogError:
            continue
        known = np.isfinite(log.rewards)
        if known.sum() < _FEWEST:
            continue
        rewards = log.rewards[known]
        inside = path.relative_to(root)
        yield Curve(
            name=str(inside),
            repository=inside.parts[0],
            steps=log.steps[known].astype(np.float64),
            rewards=rewards,
            unit_interval=bool(rewards.min() >= 0.0 and rewards.max() <= 1.0),
        )


def _class(label: str) -> str:
    """The collection's label in the words of the tables; empty where it is none of its labels."""
    for begin, name in (("flat", "flat"), ("constant", "flat"), ("collapse", "collapse"), ("S-shape", "S-shaped")):
        if label.startswith(begin):
            return name
    return {"rise to plateau": "concave", "still rising at end": "still rising"}.get(label, "")
