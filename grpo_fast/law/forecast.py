"""The forecast of a run after a step, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

PHASES = ("slow start", "rapid improvement", "plateau")
_ROW = (
    *("step", "median", "low", "high", "plateau", "plateau_low", "plateau_high", "x80", "x95", "p_gain_below_eps"),
    *("expected_gain", "phase", "phase_probability", "identifiable", "reason"),
)


@dataclass(frozen=True)
class Spending:
    """Compute spent from the start of the run to a step.

    Attributes:
        tokens: trained and sampled, whatever the meter counts.
        device_hours: of all devices together.
        money: in the currency of the device's price.
    """

    tokens: float | None = None
    device_hours: float | None = None
    money: float | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Spending:
        """Reads back what ``dataclasses.asdict`` wrote."""
        return cls(**{part.name: values[part.name] for part in fields(cls)})


@dataclass(frozen=True)
class Band:
    """Mean reward over the run as believed now: (25,) each; 90 % intervals."""

    step: tuple[float, ...]
    low: tuple[float, ...]
    median: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class GainPath:
    """Expected gain of further training, by the step at which it would end: (K,) each, the last being the budget's end."""

    step: tuple[float, ...]
    gain: tuple[float, ...]


@dataclass(frozen=True)
class Forecast:
    """The forecast after a step. Rewards are in the units they came in; intervals are 90 % intervals unless stated otherwise.

    Attributes:
        step: last step seen.
        horizon: last step of the budget.
        median: mean reward at the end of the budget.
        low: lower end of its interval.
        high: upper end.
        interval50: its 50 % interval.
        plateau: level that the law tends to, budget or not.
        plateau_low: lower end of its interval.
        plateau_high: upper end.
        plateau_interval50: its 50 % interval.
        x80: step at which 80 % of the rise to the plateau is done; None when the plateau is unknown or that is beyond the
            budget.
        x95: the same for 95 %.
        x80_interval: 90 % interval of that step, None at an end that lies beyond the budget; None where ``x80`` is.
        x95_interval: the same for 95 %.
        p_gain_below_eps: probability that the forecast curve gains less than epsilon from here to the end of the budget. A
            second rise of which the rewards show no sign is not included.
        expected_gain: expected gain of the posterior's mean curve, drift and all, from here to the end of the budget.
        epsilon: a smaller gain is not worth training for.
        gain_path: expected gain by the step at which the run would end.
        trend: gain by the end of the budget if the recent slope continued.
        trend_low: lower end of its interval.
        trend_high: upper end.
        phase: the likeliest of "slow start" (under 10 % of the rise done), "rapid improvement" and "plateau" (95 % done, or
            less than epsilon left).
        phase_probabilities: of the three, in that order.
        identifiable: whether the rewards, rather than the prior, decide where the budget ends.
        reason: why the rewards do not decide it, in words; empty when they do.
        num_observations: rewards that were used.
        num_skipped: steps whose reward was NaN.
        band: the mean curve over the whole run.
        spent: compute spent by the last step; None if not known.
        x80_spending: compute spent by ``x80``, at the recent pace.
        x95_spending: compute by ``x95``.
        end_spending: compute by the end of the budget.
    """

    step: int
    horizon: int
    median: float
    low: float
    high: float
    interval50: tuple[float, float]
    plateau: float
    plateau_low: float
    plateau_high: float
    plateau_interval50: tuple[float, float]
    x80: int | None
    x95: int | None
    x80_interval: tuple[int | None, int | None] | None
    x95_interval: tuple[int | None, int | None] | None
    p_gain_below_eps: float
    expected_gain: float
    epsilon: float
    gain_path: GainPath
    trend: float
    trend_low: float
    trend_high: float
    phase: str
    phase_probabilities: tuple[float, float, float]
    identifiable: bool
    reason: str
    num_observations: int
    num_skipped: int
    band: Band
    spent: Spending | None = None
    x80_spending: Spending | None = None
    x95_spending: Spending | None = None
    end_spending: Spending | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """90 % interval of the mean reward at the end of the budget."""
        return self.low, self.high

    @property
    def phase_probability(self) -> float:
        """Probability of :attr:`phase`."""
        return max(self.phase_probabilities)

    def to_dict(self) -> dict[str, Any]:
        """One row of ``forecasts.jsonl``: JSON values only, no NaN; spending where it is known."""
        row: dict[str, Any] = {name: getattr(self, name) for name in _ROW}
        for name in ("x80_interval", "x95_interval"):
            interval = getattr(self, name)
            row[name] = None if interval is None else list(interval)
        row["interval50"], row["plateau_interval50"] = list(self.interval50), list(self.plateau_interval50)
        row["phase_probabilities"] = list(self.phase_probabilities)
        row["band"] = {name: list(values) for name, values in asdict(self.band).items()}
        for name in ("spent", "x80_spending", "x95_spending", "end_spending"):
            spending = getattr(self, name)
            if spending is not None:
                row[name] = asdict(spending)
        return row
