"""Time and memory of the loss and its gradients against tokens, vocabulary and dead rows: ``ops.png`` beside ``ops.json``."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.ops import store

mpl.use("Agg")

_OURS = {"grpo_fast": "#c1272d", "grpo_fast, every row": "#e58a3c"}
_FLOOR = "#111111"
_RIVALS = (
    "#1f77b4",
    "#2ca02c",
    "#9467bd",
    "#17becf",
    "#8c564b",
    "#7f7f7f",
    "#bcbd22",
    "#e377c2",
    "#1b4f72",
    "#145a32",
    "#5b2c6f",
)
_MARKS = "svD^P<>Xphd"
_DPI = 120


def draw(path: Path) -> Path:
    """Draws what a results file holds.

    Args:
        path: of an ``ops.json``.

    Returns:
        Where the picture is.
    """
    content = store.read(path)
    sweeps = (tokens_sweep(content["cases"]), head_sweep(content["cases"]), dead_sweep(content["cases"]))
    figure, axes = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    style = _styles(
        row["contender"] for sweep in sweeps for record in sweep.records for row in record["rows"] if "p50_ms" in row
    )
    for column, sweep in zip(axes.T, sweeps, strict=True):
        _panel(column[0], sweep, style, value=lambda row: row.get("p50_ms"), spread=True)
        _panel(column[1], sweep, style, value=lambda row: _mib(row) if row["role"] != "floor" else None)
        column[0].set_title(sweep.title, fontsize=10)
        column[1].set_xlabel(sweep.label)
    axes[0, 0].set_ylabel("forward and backward, ms (20 % to 80 %)")
    axes[1, 0].set_ylabel("peak memory beyond the inputs, MiB")
    known = {name: line for axis in axes.flat for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    device = content["device"]["name"] + (f", {content['machine']}" if content["machine"] else "")
    figure.suptitle(f"Policy loss from hidden states: {device}")
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=_DPI)
    plt.close(figure)
    return picture


class Sweep:
    """Cases that differ in one number."""

    def __init__(self, records: list[dict[str, Any]], x: Callable[[dict[str, Any]], float], label: str) -> None:
        self.records = sorted(records, key=lambda record: x(record["parameters"]))
        self.x, self.label = x, label
        self.title = _fixed(self.records) if records else "not measured"


def tokens_sweep(records: list[dict[str, Any]]) -> Sweep:
    """The head with the most numbers of tokens."""
    plain = [record for record in _losses(records) if record["parameters"]["dead_share"] == 0]
    return Sweep(_largest(plain, lambda x: x["model"]["name"]), lambda x: x["num_tokens"], "tokens T")


def head_sweep(records: list[dict[str, Any]]) -> Sweep:
    """The number of tokens with the most heads: of one hidden size where there are three, else of all sizes."""
    plain = [record for record in _losses(records) if record["parameters"]["dead_share"] == 0]
    same = _largest(plain, lambda x: (x["num_tokens"], x["model"]["hidden_size"]))
    if len(same) >= 3:
        return Sweep(same, lambda x: x["model"]["vocab_size"], "vocabulary V")
    heads = _largest(plain, lambda x: x["num_tokens"])
    return Sweep(
        heads, lambda x: x["model"]["vocab_size"] * x["model"]["hidden_size"] / 1e6, "weights of the head H x V, millions"
    )


def dead_sweep(records: list[dict[str, Any]]) -> Sweep:
    """The sizes with the most shares of dead rows."""
    found = _largest(_losses(records), lambda x: (x["model"]["name"], x["num_tokens"]))
    return Sweep(found, lambda x: 100 * x["dead_share"], "rows of groups without advantage, %")


def _losses(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Token-level losses with a trained head."""
    wanted = {"objective": "token", "frozen_head": False, "entropy": False}
    heads = [record for record in records if record["kind"] == "head"]
    return [record for record in heads if all(record["parameters"][name] == value for name, value in wanted.items())]


def _largest(records: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    groups = defaultdict(list)
    for record in records:
        groups[key(record["parameters"])].append(record)
    return max(groups.values(), key=len, default=[])


def _fixed(records: list[dict[str, Any]]) -> str:
    """What all of them share."""
    parameters = [record["parameters"] for record in records]
    values = {
        "T": {x["num_tokens"] for x in parameters},
        "H": {x["model"]["hidden_size"] for x in parameters},
        "V": {x["model"]["vocab_size"] for x in parameters},
    }
    same = [f"{name} = {next(iter(found)):,}" for name, found in values.items() if len(found) == 1]
    return ", ".join([*same, parameters[0]["dtype"]])


def _panel(
    axis: Axes, sweep: Sweep, style: dict[str, dict[str, Any]], *, value: Callable[[dict[str, Any]], Any], spread: bool = False
) -> None:
    series: dict[str, list[tuple[float, dict[str, Any]]]] = defaultdict(list)
    for record in sweep.records:
        for row in record["rows"]:
            if value(row) is not None:
                series[row["contender"]].append((sweep.x(record["parameters"]), row))
    for name, points in series.items():
        places, heights = [x for x, _ in points], [value(row) for _, row in points]
        axis.plot(places, heights, label=name, **style[name])
        if spread:
            bounds = [[row[key] for _, row in points] for key in ("p20_ms", "p80_ms")]
            axis.fill_between(places, *bounds, color=style[name]["color"], alpha=0.15, lw=0)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.2)


def _styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """One look for a contender in all panels."""
    style: dict[str, dict[str, Any]] = {}
    rivals = 0
    for name in dict.fromkeys(names):
        if name in _OURS:
            style[name] = {"color": _OURS[name], "marker": "o", "lw": 2.4, "ms": 6, "zorder": 3}
        elif name == "bare products":
            style[name] = {"color": _FLOOR, "marker": "_", "ms": 9, "lw": 1.4, "ls": "--"}
        else:
            style[name] = {"color": _RIVALS[rivals % len(_RIVALS)], "marker": _MARKS[rivals % len(_MARKS)], "lw": 1.4, "ms": 5}
            rivals += 1
    return style


def _mib(row: dict[str, Any]) -> float | None:
    peak = row.get("peak_extra_bytes") if "p50_ms" in row else None
    return None if peak is None else peak / 2**20


if __name__ == "__main__":
    print(*(draw(Path(name)) for name in sys.argv[1:]), sep="\n")
