from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from grpo_fast.report.plan_plot import headline, plot_plan, write_plan_plot
from grpo_fast.report.theme import DARK

NAMES = ("low", "low50", "median", "high50", "high")


def spread(*values: float | None) -> dict[str, float | None]:
    return dict(zip(NAMES, values, strict=True))


def plan(**changes: Any) -> dict[str, Any]:
    """What ``grpo-fast plan --json`` prints, as far as the picture reads it."""
    steps = np.linspace(0, 80, 41)
    middle = 0.2 + 0.5 * (1 - np.exp(-steps / 30))
    path = {name: (middle + shift).tolist() for name, shift in zip(NAMES, (-0.2, -0.1, 0.0, 0.1, 0.2), strict=True)}
    cost = {"step": spread(1, 2, 3, 4, 5), "run": spread(0.5, 0.8, 1, 1.3, 2)}
    last = {name: values[-1] for name, values in path.items()}
    return {
        "device": "H100 80GB HBM3",
        "known": {"start_reward": 0.2, "start_reward_error": 0.05, "num_devices": 8},
        "trajectory": [{"share": 1.0, "step": 80, **last}],
        "path": {"step": steps.tolist(), **path},
        "plateau": {
            "probability_within_budget": 0.42,
            "x80": {"step": spread(10, 20, 30, 50, 70)},
            "x95": {"step": spread(20, 40, 60, None, None)},
        },
        "outcomes": {
            "hardly moves": 0.2,
            "rises to a plateau": 0.4,
            "peaks and falls back": 0.02,
            "still rises at the end": 0.3,
            "falls": 0.08,
        },
        "costs": dict.fromkeys(("tokens", "flops", "device_hours", "wall_hours", "money"), cost) | {"energy_kwh": None},
    } | changes


def words_of(figure: Figure) -> str:
    labels = [label.get_text() for axis in figure.axes for label in axis.get_yticklabels()]
    return "\n".join([*(t.get_text() for axis in figure.axes for t in (*axis.texts, axis._left_title)), *labels])


def test_every_number_is_where_it_belongs() -> None:
    figure = plot_plan(plan())
    rewards, when, ways, costs = figure.axes
    words = words_of(figure)
    assert headline(plan()) == "From 0.2 to 0.67 (0.47 to 0.87) at step 80; plateau within the budget: 42 %"
    assert headline(plan()) in words
    assert {"step 30", "step 60", "40 %", "8.0 %", "device time", "1 h 00 min", "30 min 00 s to 2 h 00 min"} <= set(
        words.split("\n")
    )
    assert "energy" not in words
    assert rewards.get_xlim() == when.get_xlim() == (0, 80)
    assert [line.get_marker() for line in when.lines].count(">") == 1, "an arrow where the interval leads beyond the budget"
    assert [bar.get_width() for bar in ways.patches] == [0.08, 0.3, 0.02, 0.4, 0.2]
    assert len(costs.get_yticks()) == 5


def test_what_is_unknown_is_told() -> None:
    nothing = plan(
        known={"start_reward": None, "start_reward_error": None, "num_devices": 1},
        costs={
            "tokens": plan()["costs"]["tokens"],
            **dict.fromkeys(("flops", "device_hours", "wall_hours", "money", "energy_kwh")),
        },
        plateau=plan()["plateau"] | {"x95": {"step": spread(None, None, None, None, None)}},
    )
    words = words_of(plot_plan(nothing, DARK))
    assert "From an unknown start" in words
    assert "beyond the budget" in words
    assert "time and money are unknown" in words


def test_a_png_file_is_written(tmp_path: Path) -> None:
    write_plan_plot(tmp_path / "plan.png", plan())
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_full_disk_is_told_with_the_file() -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_plan_plot(Path("/dev/full"), plan())
