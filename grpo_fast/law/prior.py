"""The prior: how much, and in which shape, a run is expected to rise before its first reward is known.

Two tables of logits, linear in what is known of the run, give the probabilities of the normals that the rise may come from and
of the classes of shapes. They are fitted on finished runs (:mod:`grpo_fast.law.fitting`); the one that ships was fitted on
published training curves by ``benchmarks/law/fit_prior.py`` and carries its figures.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from grpo_fast.law.forms import Array
from grpo_fast.law.posterior import DRIFTS, GRID, Believed
from grpo_fast.law.scatter import LEAST_SD
from grpo_fast.law.shapes import CLASSES
from grpo_fast.run_dir import naming

PARTS = ((0.0, 0.01), (0.0, 0.04), (0.05, 0.1), (0.2, 0.25), (0.8, 0.25), (1.2, 0.6))
"""Mean and standard deviation of the normals that a rise may come from, in units of the reward's range."""
FEATURES = ("one", "steps", "size", "start", "unknown_range", "lora", "validation")
SHARES = (0.2, 0.4, 0.6, 0.8)
"""Shares of the budget behind a forecast at which the spread is known."""

_START_SD = 0.3
_DRIFT_LOG_SD = 1.0
_FORMAT = 1
_FILE = "default_prior.json"


@dataclass(frozen=True)
class RunFacts:
    """Facts about a run that are known before it begins; each of them may be missing.

    Attributes:
        size_b: parameters of the model in 1e9.
        start: mean reward of the untrained policy on the training prompts, from a probe before step 1.
        start_error: standard error of that probe.
        lora: whether adapters are trained rather than all weights.
        validation: whether the rewards are held-out accuracies rather than those of the training batches.

    Raises:
        ValueError: a size that is not positive, or an error without a start.
    """

    size_b: float | None = None
    start: float | None = None
    start_error: float | None = None
    lora: bool = False
    validation: bool = False

    def __post_init__(self) -> None:
        if self.size_b is not None and not (self.size_b > 0 and math.isfinite(self.size_b)):
            raise ValueError(f"size_b={self.size_b} must be a positive number of 1e9 parameters, or None when unknown")
        if self.start is not None and not math.isfinite(self.start):
            raise ValueError(f"start={self.start} must be a finite mean reward, or None when unknown")
        if self.start_error is not None and not (self.start is not None and self.start_error > 0):
            raise ValueError(f"start_error={self.start_error} must be positive and come with a start ({self.start})")


@dataclass(frozen=True)
class RunScale:
    """The units of one run's rewards.

    Attributes:
        unit: reward difference that the prior counts as 1.
        low: least mean reward that is possible; ``-inf`` where unknown.
        high: greatest; ``inf`` where unknown.
        start: mean reward of the untrained policy, as a share of the range; NaN where unknown.
        noise_sd: of one step's reward.
    """

    unit: float
    low: float = -math.inf
    high: float = math.inf
    start: float = math.nan
    noise_sd: float = 0.0

    @property
    def bounded(self) -> bool:
        """Whether the range is known."""
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True)
class Prior:
    """A prior of reward curves.

    Attributes:
        part_logits: (6, 7) of :data:`PARTS` by :data:`FEATURES`.
        class_logits: (9, 7) of :data:`~grpo_fast.law.shapes.CLASSES` by features.
        drift_none: probability that a run does not drift.
        drift_median: median of the drift's standard deviation over a budget where there is one, in units of the range.
        spread: factors by which forecasts' intervals are stretched at :data:`SHARES`, so that 90 % intervals hold 90 %; for
            rewards that scatter on their own.
        about: where the prior comes from, with its figures.

    Raises:
        ValueError: tables of another size, or numbers out of range.
    """

    part_logits: Array
    class_logits: Array
    drift_none: float = 0.5
    drift_median: float = 0.06
    spread: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, rows in (("part_logits", len(PARTS)), ("class_logits", len(CLASSES))):
            shape = np.shape(getattr(self, name))
            if shape != (rows, len(FEATURES)) or not np.all(np.isfinite(getattr(self, name))):
                raise ValueError(f"{name} has shape {shape}; it must hold {rows} x {len(FEATURES)} finite logits")
        if not 0 < self.drift_none < 1 or not self.drift_median > 0:
            raise ValueError(f"drift_none={self.drift_none} must lie in (0, 1), drift_median={self.drift_median} above 0")
        if len(self.spread) != len(SHARES) or min(self.spread) <= 0:
            raise ValueError(f"spread={self.spread} must hold {len(SHARES)} positive numbers")

    @classmethod
    def default(cls) -> Prior:
        """The prior that ships with the package."""
        return _shipped()

    @classmethod
    def load(cls, path: str | Path) -> Prior:
        """Reads a prior that :meth:`save` wrote.

        Raises:
            ValueError: the file holds no prior.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no prior ({error}); `grpo-fast law fit` writes one") from error

    def save(self, path: str | Path) -> None:
        """Writes it as JSON, logits to four decimals."""
        tables = {name: np.round(getattr(self, name), 4).tolist() for name in ("part_logits", "class_logits")}
        with naming(path):
            Path(path).write_text(json.dumps({**self.to_dict(), **tables}, indent=1) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """JSON values, exact."""
        tables = {name: np.asarray(getattr(self, name)).tolist() for name in ("part_logits", "class_logits")}
        rest = {name: getattr(self, name) for name in ("drift_none", "drift_median")}
        return {"format": _FORMAT, **tables, **rest, "spread": list(self.spread), "about": dict(self.about)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Prior:
        """Reads back :meth:`to_dict`.

        Raises:
            ValueError: another format, or numbers out of range.
        """
        if values["format"] != _FORMAT:
            raise ValueError(f"its format is {values['format']}, but this version reads format {_FORMAT}; fit it again")
        return cls(
            part_logits=np.asarray(values["part_logits"], dtype=np.float64),
            class_logits=np.asarray(values["class_logits"], dtype=np.float64),
            spread=tuple(values["spread"]),
            about=values["about"],
            **{name: float(values[name]) for name in ("drift_none", "drift_median")},
        )

    def believed(self, facts: RunFacts, scale: RunScale, *, horizon: int) -> Believed:
        """The prior of one run in its own units.

        Args:
            facts: what is known of it.
            scale: its units.
            horizon: steps of its budget.
        """
        known = features(facts, scale, horizon=horizon)
        rise, rise_sd = np.array(PARTS).T * scale.unit
        log_classes = log_softmax(self.class_logits @ known) - np.log(GRID.num_in_class)
        return Believed(
            log_parts=log_softmax(self.part_logits @ known),
            rise=rise,
            rise_sd=rise_sd,
            log_shapes=log_classes[GRID.classes],
            log_drifts=self._log_drifts(scale),
            start_sd=_START_SD * scale.unit,
            least_noise=LEAST_SD * scale.unit,
            low=scale.low,
            high=scale.high,
        )

    def spread_at(self, share: float, noise_share: float) -> float:
        """Factor by which intervals are stretched after a share of the budget.

        Args:
            share: of the budget.
            noise_share: as :class:`~grpo_fast.law.posterior.Draws` have it. Where the rewards follow one another (smoothed ones
                do), their noise is in the drift, which is believed as it is: the factor tends to 1.
        """
        return 1.0 + noise_share * (float(np.interp(share, SHARES, self.spread)) - 1.0)

    def _log_drifts(self, scale: RunScale) -> Array:
        sizes = DRIFTS[1:] * max(scale.noise_sd / scale.unit, 1e-6)
        away = np.log(sizes / self.drift_median) / _DRIFT_LOG_SD
        some = log_softmax(-0.5 * away**2) + math.log1p(-self.drift_none)
        return np.concatenate([[math.log(self.drift_none)], some])


def features(facts: RunFacts, scale: RunScale, *, horizon: int) -> Array:
    """(7,) features in which the logits are linear, each about 0 for an ordinary run and 0 where unknown."""
    size = 0.0 if facts.size_b is None else math.log10(facts.size_b / 3.0)
    start = 0.0 if math.isnan(scale.start) else scale.start - 0.4
    return np.array(
        [
            1.0,
            float(np.clip(math.log10(horizon / 100.0), -1.5, 1.5)),
            float(np.clip(size, -1.0, 1.5)),
            start,
            float(not scale.bounded),
            float(facts.lora),
            float(facts.validation),
        ]
    )


@functools.cache
def _shipped() -> Prior:
    text = (resources.files("grpo_fast.law") / _FILE).read_text(encoding="utf-8")
    return Prior.from_dict(json.loads(text))
