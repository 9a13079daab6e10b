"""One HTML file about a run: it needs no network, and opens anywhere."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from grpo_fast.config import Config
from grpo_fast.report.palettes import light_and_dark
from grpo_fast.report.plots import pictures_of
from grpo_fast.report.run import Run, RunError, first_number
from grpo_fast.report.theme import LIGHT, drawing
from grpo_fast.run_dir import replaced, why_unwritable, write_whole
from grpo_fast.sinks.quantities import duration, percent, si, significant
from grpo_fast.types import COMPLETION_COLUMNS

REPORT = "report.html"
PLOTS = "plots"
_SAMPLES_A_STEP = 3
_LONGEST_TEXT = 2000

_HEADINGS = {
    "phases": "The run",
    "forecasts": "Forecasts and what came",
    "beliefs": "How the forecast narrowed",
    "stop": "The decision to stop",
    "alarm": "The collapse alarm",
    "compute": "Costs, and what was left",
    "health": "Health",
}
_CAPTIONS = {
    "phases": """
        Each dot is the mean reward of a step, the line is their running mean, and diamonds are the reward on held-out prompts.
        Shades are the phases that the forecasts saw, hatching is unused budget, and the band is the reward forecast for further
        steps.""",
    "forecasts": """
        The forecasts made after 20, 40, 60 and 80 % of the steps, each only from the rewards left of the vertical line. The
        band is a 90 % interval.""",
    "stop": """
        Top: the reward forecast for the end of the budget, step by step. Bottom: the probability that too little is left to
        gain for more training to be worth it.""",
    "beliefs": """
        Left: the probability of each phase after every step. Right: the mean reward over the whole budget in the first and in
        the last forecast, with 90 % bands.""",
    "alarm": """
        Each detector adds up how far its signal has moved in the wrong direction, beyond its own noise. A collapse is confirmed
        if the reward's detector reaches the dashed line, or two thirds of it while another one is over the line.""",
    "compute": """
        Seconds are wall-clock time. FLOPs are those that the model needs; padding and recomputation inside kernels are not
        counted. The rest is estimated from the mean cost of a step.""",
    "health": """
        The first signs of a run that goes wrong: entropy that vanishes, gradients that jump, completions cut at the length
        limit, and groups that teach nothing because all their rewards are equal.""",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure in four versions, wide and narrow, light and dark, as base64 PNG."""

    name: str
    heading: str
    caption: str
    wide: str
    wide_dark: str
    narrow: str
    narrow_dark: str


@dataclass(frozen=True, slots=True)
class Tile:
    """One number at the top of a report."""

    label: str
    value: str
    note: str = ""


def write_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Writes ``report.html`` and ``plots/*.png`` of a run, which may be finished, going on or killed.

    Args:
        run_dir: directory of the run.
        output: directory to write to, which is made where there is none; without one, the run's own.

    Returns:
        The HTML file.

    Raises:
        RunError: the directory is not a run, the run has not done a step, or the output cannot be written.
    """
    run = Run.load(run_dir)
    folder = run.path if output is None else Path(output)
    why = why_unwritable(folder)
    if why is not None:
        raise RunError(f"the report cannot be written into {folder} ({why}); name another directory with --output")
    page = _template().render(
        run=run,
        name=run.path.resolve().name,
        model=_fact(run, "model"),
        dataset=_fact(run, "dataset"),
        headline=headline(run),
        reason=reason(run),
        use=use(run),
        tiles=tiles(run),
        pictures=_pictures(run, folder / PLOTS),
        samples=samples(run),
        changed=changed_settings(run.config),
        device=_table((run.summary or {}).get("device")),
        versions=_table((run.summary or {}).get("versions")),
        events=run.events,
    )
    path = folder / REPORT
    write_whole(path, page)
    return path


def headline(run: Run) -> str:
    """One sentence about how the run ended, with numbers."""
    done = f"step {run.last_step} of {run.max_steps}"
    left = percent(1 - run.last_step / run.max_steps).replace(" ", "\u00a0")
    level = f"at a reward of {run.final_reward:.3f}" if math.isfinite(run.final_reward) else "without a single reward"
    if run.stopped_by is None:
        return f"The run is unfinished: {done}, {level}."
    if run.stopped_by == "forecast":
        why = f"because a plateau was forecast; {left} of the steps were not needed"
        return f"The run stopped itself at {done}, {level}, {why}."
    if run.stopped_by == "collapse":
        return f"The run was stopped at {done}, {level}, because its policy collapsed."
    if run.stopped_by == "max_steps":
        return f"The run completed all of its {run.last_step} steps and ended {level}."
    if run.stopped_by in {"interrupt", "user"}:
        who = "was interrupted" if run.stopped_by == "interrupt" else "was stopped by its caller"
        return f"The run {who} at {done}, {level}; it can be resumed."
    return f"The run ended at {done}, {level}, because the budget {run.stopped_by} was used up."


def reason(run: Run) -> str:
    """Why the run ended, or the forecast of one that has not."""
    if run.summary is not None:
        return str(run.summary.get("reason") or "")
    forecast = run.forecasts[-1] if run.forecasts else None
    if forecast is None:
        return "There is no forecast yet."
    words = "Its forecast for the end is {median:.3f} (90 % interval {low:.3f} to {high:.3f}).".format(**forecast)
    why = str(forecast.get("reason") or "too few rewards").rstrip(".")
    return words if forecast.get("identifiable", True) else f"{words} It is not identifiable yet: {why}."


def use(run: Run) -> str:
    """The checkpoint to use of a run that has ended, and why; empty before the end, or if there is none."""
    chosen: Mapping[str, Any] | None = (run.summary or {}).get("use")
    if chosen is None:
        return ""
    return f"The model to use is {chosen['checkpoint']}, the best of those saved: {chosen['by']} {chosen['reward']:.3f}."


def tiles(run: Run) -> list[Tile]:
    """The most important numbers; those that were not measured are left out."""
    summary = run.summary or {}
    compute: Mapping[str, Any] = summary.get("compute") or {}
    rewards = run.metric("reward")
    finite = rewards[[math.isfinite(value) for value in rewards]]
    start = f"from {finite[:5].mean():.3f} at the start" if finite.size else ""
    shown = [Tile("Reward", f"{run.final_reward:.3f}", start)] if finite.size else []
    if math.isfinite(run.eval_reward):
        shown.append(Tile("Held-out reward", f"{run.eval_reward:.3f}", "on prompts that were not trained on"))
    if run.forecasts:
        last = run.forecasts[-1]
        shown.append(Tile("Forecast for the end", f"{last['median']:.3f}", f"90 % in {last['low']:.3f} to {last['high']:.3f}"))
    shown.append(Tile("Steps", f"{run.last_step:,}", f"of {run.max_steps:,} at most"))
    seconds, flops = run.seconds, run.flops
    if seconds > 0:
        shown.append(Tile("Wall-clock time", duration(seconds), f"{duration(seconds / run.steps.size)} per step"))
    if flops > 0:
        mfu = run.last("mfu")
        shown.append(Tile("Model FLOPs", si(flops, "FLOP"), f"MFU {percent(mfu)}" if math.isfinite(mfu) else ""))
    tokens = first_number(compute.get("tokens"), run.last("num_tokens"))
    if tokens > 0:
        rate = f"{si(tokens / seconds)} per second" if seconds > 0 else ""
        shown.append(Tile("Tokens", si(tokens), rate))
    return shown + _cost_tiles(run, compute)


def _cost_tiles(run: Run, compute: Mapping[str, Any]) -> list[Tile]:
    hours = run.gpu_hours
    energy = first_number(compute.get("energy_kwh"), run.last("energy_kwh"))
    money = first_number(compute.get("money"), run.last("money"))
    shown = [Tile("Device time", duration(hours * 3600), "all devices")] if hours > 0 else []
    if energy > 0:
        shown.append(Tile("Energy", f"{significant(energy, 2)} kWh", str(compute.get("energy_source", ""))))
    if money > 0:
        price = first_number(run.config.get("price_per_gpu_hour"))
        shown.append(Tile("Money", significant(money), f"at {significant(price)} per device hour" if price > 0 else ""))
    saved = first_number(((run.summary or {}).get("saved") or {}).get("steps"))
    if run.stopped_by == "forecast" and saved > 0:
        shown.append(Tile("Saved", percent(saved), "of the allowed steps"))
    return shown


def samples(run: Run) -> list[dict[str, Any]]:
    """Completions of the first, the middle and the last step that logged any; long texts are cut and say so."""
    steps = sorted({int(row["step"]) for row in run.completions})
    chosen = {steps[0], steps[len(steps) // 2], steps[-1]} if steps else set()
    rows = []
    for step in sorted(chosen):
        of_step = [row for row in run.completions if row["step"] == step][:_SAMPLES_A_STEP]
        rows += [
            {
                "step": step,
                "prompt": _shortened(_words(row.get("prompt", ""))),
                "completion": _shortened(str(row.get("completion", ""))),
                "reward": significant(first_number(row.get("reward"))),
                "advantage": significant(first_number(row.get("advantage"))),
                "extra": {
                    name: _cell(value) for name, value in row.items() if name not in COMPLETION_COLUMNS and value is not None
                },
            }
            for row in of_step
        ]
    return rows


def _cell(value: Any) -> str:
    """A value that a reward function logged of a completion."""
    return significant(value) if isinstance(value, int | float) and not isinstance(value, bool) else _shortened(str(value))


def changed_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Settings that differ from this version's defaults."""
    defaults = Config.parse({}).model_dump(mode="json", exclude_none=True)
    return {name: _value(value) for name, value in config.items() if value != defaults.get(name)}


def _pictures(run: Run, folder: Path) -> list[Picture]:
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with drawing():
        for name, draw in pictures_of(run).items():
            images = {}
            for width, narrow in (("wide", False), ("narrow", True)):
                images[width], images[f"{width}_dark"] = light_and_dark(draw(run, dataclasses.replace(LIGHT, narrow=narrow)))
            with replaced(folder / f"{name}.png") as file:
                file.write(images["wide"])
            heading, caption = _HEADINGS[name], " ".join(_CAPTIONS[name].split())
            encoded = {dress: base64.b64encode(image).decode() for dress, image in images.items()}
            made.append(Picture(name=name, heading=heading, caption=caption, **encoded))
    return made


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("grpo_fast", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def _fact(run: Run, name: str) -> str:
    return str((run.summary or {}).get(name) or run.config.get(name) or "unknown")


def _table(values: Any) -> dict[str, str]:
    return {str(key): _value(value) for key, value in values.items()} if isinstance(values, Mapping) else {}


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_value(item) for item in value) or "none"
    return str(value)


def _words(prompt: Any) -> str:
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        return "\n".join(
            f"{turn.get('role')}: {turn.get('content')}" if isinstance(turn, Mapping) else str(turn) for turn in prompt
        )
    return str(prompt)


def _shortened(text: str) -> str:
    more = len(text) - _LONGEST_TEXT
    return text if more <= 0 else f"{text[:_LONGEST_TEXT]}\n[... {more} more characters]"
