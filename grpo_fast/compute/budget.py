"""Limits of a run, and which of them it has reached."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Self


@dataclass(frozen=True, slots=True)
class Usage:
    """Usage of a run so far, in the units of :class:`Budget`."""

    steps: int
    tokens: int
    flops: int
    gpu_hours: float
    wall: float
    money: float | None
    energy: float


BUDGET_FIELDS = {
    "steps": "max_steps",
    "tokens": "max_tokens",
    "flops": "max_flops",
    "gpu_hours": "max_gpu_hours",
    "wall": "max_wall_hours",
    "money": "max_money",
    "energy": "max_energy_kwh",
}
"""Budget's fields and the configuration's names of the same limits."""

_UNITS = {
    "tokens": "tokens",
    "flops": "FLOPs",
    "gpu_hours": "device hours",
    "wall": "hours of wall-clock time",
    "money": "units of money",
    "energy": "kWh",
}


@dataclass(frozen=True, slots=True)
class BudgetVerdict:
    """The limit that ended a run."""

    limit: str
    """Field of :class:`Budget`."""
    used: float
    """Usage of the run."""
    allowed: float
    """The limit."""

    @property
    def stopped_by(self) -> str:
        """The configuration's name of the limit, as in ``summary.json``."""
        return BUDGET_FIELDS[self.limit]

    @property
    def reason(self) -> str:
        """One sentence with numbers."""
        if self.limit == "steps":
            used = "1 step is done" if self.used == 1 else f"{self.used:,.6g} steps are done"
        else:
            used = f"{self.used:,.6g} {_UNITS[self.limit]} are used"
        return f"{self.stopped_by}={self.allowed:,.6g} is reached: {used}."


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of a run; the first one reached ends it. ``None`` sets no limit.

    Raises:
        ValueError: a limit that is not a positive finite number.
    """

    steps: float | None = None
    """Trainer steps."""
    tokens: float | None = None
    """Prompt and completion tokens, each prompt counted for each of its completions."""
    flops: float | None = None
    """Model FLOPs, all phases."""
    gpu_hours: float | None = None
    """Hours times devices; a CPU counts as one device."""
    wall: float | None = None
    """Hours of wall-clock time, over all resumes."""
    money: float | None = None
    """Money, in the currency of ``price_per_gpu_hour``."""
    energy: float | None = None
    """Kilowatt-hours."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"Budget({item.name}=...) must be a positive number, or None for no limit; got {value!r}")

    @classmethod
    def from_config(cls, **limits: float | None) -> Self:
        """Builds a budget from the configuration's names: ``max_steps``, ``max_tokens``, ... (see :data:`BUDGET_FIELDS`).

        Raises:
            TypeError: a name that is no limit.
            ValueError: a limit that is not positive.
        """
        names = {config_name: field for field, config_name in BUDGET_FIELDS.items()}
        unknown = limits.keys() - names.keys()
        if unknown:
            raise TypeError(f"unknown limits {', '.join(sorted(unknown))}; known are {', '.join(names)}")
        return cls(**{names[name]: value for name, value in limits.items()})

    def shares(self, usage: Usage) -> dict[str, float]:
        """Used share of each limit that is set; 1 and more means reached.

        Raises:
            ValueError: money is limited and the meter knows no price.
        """
        used = asdict(usage)
        if self.money is not None and usage.money is None:
            raise ValueError(f"Budget(money={self.money:g}) needs a price: set price_per_gpu_hour")
        return {name: used[name] / limit for name, limit in asdict(self).items() if limit is not None}

    def check(self, usage: Usage) -> BudgetVerdict | None:
        """The limit that is reached (of several, the one exceeded by the largest share); ``None`` while some is left of each.

        Call it once before the first step too: a budget in money without a price is refused then.

        Raises:
            ValueError: as :meth:`shares`.
        """
        shares = self.shares(usage)
        limit = max(shares, key=shares.__getitem__, default=None)
        if limit is None or shares[limit] < 1:
            return None
        return BudgetVerdict(limit, used=getattr(usage, limit), allowed=getattr(self, limit))

    def remaining(self, usage: Usage) -> dict[str, float]:
        """Share of each limit that is left, in [0, 1].

        Raises:
            ValueError: as :meth:`shares`.
        """
        return {name: max(0.0, 1.0 - share) for name, share in self.shares(usage).items()}
