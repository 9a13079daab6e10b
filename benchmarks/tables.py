"""Writes what is generated from ``benchmarks/results``: figures and tables of README and docs, and ``benchmarks/RESULTS.md``.

A page says where: between ``<!-- generated: NAME ... -->`` and ``<!-- end -->`` stands what :data:`MADE` has under that name.
``--check`` only says whether all pages are up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs as a script too

from benchmarks.ops import report  # noqa: E402
from benchmarks.rollout import report as rollout  # noqa: E402
from benchmarks.system import report as system  # noqa: E402
from benchmarks.transfer import report as transfer  # noqa: E402

RESULTS = Path(__file__).parent / "results"
README = ROOT / "README.md"
DOCS = ROOT / "docs"
RESULTS_PAGE = Path(__file__).parent / "RESULTS.md"
_MARKED = re.compile(r"(<!-- generated: (?P<name>\w+)[^\n]*-->\n).*?(<!-- end -->\n)", re.DOTALL)
_WIDTH = 120
_MODELS = {"the embedded model": "", "SmolLM2-135M": "_smollm2"}
_MACHINES = ("", "_zen4", "_xeon")


def highlights() -> str:
    """The README's first figures, each with what it was measured on."""
    return "".join(
        textwrap.fill(point, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False) + "\n"
        for point in (_faster(), _smaller(), _stops_by_itself(), _accountable())
    )


def _faster() -> str:
    (small, *small_elsewhere), (large, *large_elsewhere) = (
        [_read(f"cpu/step_time{model}{machine}.json") for machine in _MACHINES] for model in _MODELS.values()
    )
    ratios = [
        f"{_ratio(one)} and {_ratio(other)} on an {_place(one)}"
        for one, other in zip(small_elsewhere, large_elsewhere, strict=True)
    ]
    return (
        f"**Faster.** A training step of the embedded model (0.67 M parameters) takes {_beside_trl(small)}, and a step of "
        f"SmolLM2-135M {_beside_trl(large)}. These are medians of {small['num_steps']} and {large['num_steps']} steps, ours "
        f"and those of TRL {small['versions']['trl']} in turns, with {small['torch_threads']} threads on an {_place(small)}. "
        f"The ratios are {', and '.join(ratios)}."
    )


def _place(result: dict[str, Any]) -> str:
    return str(result["machine"]).removesuffix(", quiet")


def _ratio(result: dict[str, Any]) -> str:
    return f"{result['median_ratio_trl_over_ours']:.1f}x"


def _beside_trl(result: dict[str, Any]) -> str:
    ours, theirs = (report.duration(1000 * result[name]["p50"]) for name in ("grpo_fast_step_s", "trl_step_s"))
    return f"{ours} against TRL's {theirs} ({_ratio(result)})"


def _smaller() -> str:
    content = _read("cpu/ops.json")
    record = content["cases"][0]
    told = {
        row["contender"]: f"{report.duration(row['p50_ms'])} and {report.size(row['peak_extra_bytes'])}"
        for row in record["rows"]
        if "p50_ms" in row
    }
    sizes = record["parameters"]
    return (
        f"**Smaller.** For {sizes['num_tokens']:,} tokens of {sizes['model']['name']}, whose vocabulary has "
        f"{sizes['model']['vocab_size']:,} entries, the loss and its gradients take {told['grpo_fast']} of memory by "
        f"{content['torch_threads']} threads on a CPU. TRL's chunked loss takes {told['trl chunked_logprob']}, plain PyTorch "
        f"{told['torch eager']}."
    )


def _stops_by_itself() -> str:
    runs, found = _read("cpu/embedded_run.json")["runs"], _read("law/published.json")
    rule = found["stopping"]["all"][found["stop_rule"]]
    kept = min(run["stop"]["accuracy"] / run["final_accuracy"] for run in runs)
    return (
        f"**Stops by itself.** On the embedded task the forecast ended all {len(runs)} runs early (seeds "
        f"{', '.join(str(run['seed']) for run in runs)}). That saved {_flops_saved(runs):.0%} of the FLOPs and kept at least "
        f"{kept:.1%} of the final accuracy. Replayed on {found['stopping']['all']['curves']} published reward curves of real "
        f"GRPO runs, it saves {rule['saved'][0]:.0%} of the compute at a mean loss of "
        f"{rule['lost'][0]:.4f} reward on a scale of 0 to 1; {rule['false'][0]:.1%} of the runs lose more than 0.02."
    )


def _accountable() -> str:
    content = _read("cpu/sync.json")
    case = content["cases"][0]
    return (
        "**Accountable.** Every step is charged with its tokens, FLOPs, device time, energy and money, and a run's report says "
        "why it ended. After every update vLLM must prove that it holds the new weights; the proof takes "
        f"{report.duration(case['probe_ms'])} of a weight sync of {report.duration(case['rows']['grpo_fast']['p50_ms'])} for "
        f"{case['layout']} on {content['cores']} CPU cores."
    )


def step_table() -> str:
    """A whole training step beside TRL's, with the memory of the process at its fullest."""
    rows = []
    for model, of_model in _MODELS.items():
        for of_machine in _MACHINES:
            found = _read(f"cpu/step_time{of_model}{of_machine}.json")
            times = [report.duration(1000 * found[f"{name}_step_s"]["p50"]) for name in ("grpo_fast", "trl")]
            peaks = [report.size(round(found["peak_memory_mib"][name] * 2**20)) for name in ("grpo_fast", "trl")]
            rows.append([f"{model}, {found['machine']}", *times, _ratio(found), *peaks])
    head = f"median step, {found['torch_threads']} threads, torch {found['versions']['torch']}"
    return _markdown([head, "grpo_fast", f"TRL {found['versions']['trl']}", "ratio", "peak memory", "TRL's"], rows)


def early_stop_table() -> str:
    """Runs of the embedded model that the forecast ended, beside the whole budget, which was trained too."""
    found = _read("cpu/embedded_run.json")
    rows = [
        [
            str(run["seed"]),
            f"{run['initial_accuracy']:.3f}",
            f"{run['stop']['step']} of {run['max_steps']}",
            f"{run['stop']['accuracy']:.3f}",
            f"{run['final_accuracy']:.3f}",
            f"{_flops_saved([run]):.0%}",
            f"{run['stop']['seconds']:.0f} s of {run['seconds']:.0f} s",
        ]
        for run in found["runs"]
    ]
    head = ["seed", "accuracy at the start", "stopped at step", "accuracy there", "accuracy after all steps", "FLOPs saved"]
    return _markdown([*head, f"time on {found['device']['num_cores']} CPU cores"], rows)


def _flops_saved(runs: list[dict[str, Any]]) -> float:
    return mean(1 - run["stop"]["flops"] / run["flops"] for run in runs)


def law_table() -> str:
    """The law against its best rival at each point, on published curves of repositories that its prior never saw."""
    found = _read("law/published.json")
    about, shares = found["about"], ("20 %", "40 %", "60 %")
    law = found["law"]
    rows = []
    for group, label in (("all", f"all {about['curves']} curves"), ("learning", "curves that rise")):
        ours = found["forecasts"][group]["level"]["error"][law][: len(shares)]
        rows.append((f"error, {label}", [f"{value[0]:.3f}" for value in ours]))
        rivals = found["against_best"]["error"][group][: len(shares)]
        errors = found["forecasts"][group]["level"]["error"]
        best = [f"{errors[row['best']][at][0]:.3f} ({row['best']})" for at, row in enumerate(rivals)]
        rows.append(("best rival at that point", best))
        rows.append(("ours over that, 90 % interval", [_interval(row["ratio"]) for row in rivals]))
        rows.append(("ours over the rival that is best elsewhere", [_interval(row["chosen"]) for row in rivals]))
    bounds = found["limits"]
    rows.append(
        ("error of this law if it knew that the run will rise", [f"{value:.3f}" for value in bounds["told"][: len(shares)]])
    )
    mixtures = (
        ("error", "error of the best fixed mixture of all these forecasters, chosen on these very curves"),
        ("elsewhere", "the same, chosen on all repositories but the one judged"),
    )
    rows += [(label, [f"{row[part]:.3f}" for row in bounds["mixture"][: len(shares)]]) for part, label in mixtures]
    inside = found["forecasts"]["all"]["level"]["inside90"][law][: len(shares)]
    rows.append(("90 % intervals that held what came", [f"{value[0]:.0%}" for value in inside]))
    head = [f"{about['repositories']} repositories, each counted once", *(f"{share} seen" for share in shares)]
    return _markdown(head, [[name, *cells] for name, cells in rows])


def interval_table() -> str:
    """How often the law's 90 % intervals held what came, by the kind of curve."""
    found = _read("law/published.json")
    shares = ("20 %", "40 %", "60 %", "80 %")
    groups = {"all curves": "all", **{name: f"class: {name}" for name in found["about"]["classes"]}}
    rows = []
    for label, group in sorted(groups.items(), key=lambda item: (item[1] != "all", item)):
        inside = found["forecasts"][group]["level"]["inside90"][found["law"]]
        rows.append([f"{label} ({found['forecasts'][group]['curves']})", *(f"{value[0]:.0%}" for value in inside)])
    return _markdown(["kind of curve", *(f"{share} seen" for share in shares)], rows)


def stop_table() -> str:
    """The law's stop against simple ones, replayed on the same curves."""
    found = _read("law/published.json")
    rules = found["stopping"]["all"]
    names = [found["stop_rule"], "patience 20%", "patience 10%", "fixed 40%", "fixed 80%", "plug-in, exponential + R0"]
    rows = []
    for name in [*names, "hindsight oracle"]:
        row = {measure: rules[name][measure][0] for measure in ("saved", "lost", "false", "bad")}
        rows.append([name, f"{row['saved']:.0%}", f"{row['lost']:.4f}", f"{row['false']:.1%}", f"{row['bad']:.1%}"])
    head = f"rule, on {rules['curves']} curves"
    return _markdown([head, "compute saved", "mean reward lost", "lost over 0.02", "lost over 0.05"], rows)


def ops_table() -> str:
    """The loss and its gradients from hidden states on a CPU: the case that the project promises something about."""
    content = _read("cpu/ops.json")
    record = content["cases"][0]
    sizes, device = record["parameters"], content["device"]
    timed = sorted((row for row in record["rows"] if "p50_ms" in row), key=lambda row: row["p50_ms"])
    rows = [
        [
            row["contender"] + ("" if row["role"] != "rival" or row["package"] == "torch" else f" ({row['version']})"),
            report.duration(row["p50_ms"]),
            f"{row['times_floor']:.2f}",
            "" if row["role"] == "floor" else report.size(row["peak_extra_bytes"]),
        ]
        for row in timed
    ]
    head = (
        f"loss and gradients from hidden states: T = {sizes['num_tokens']:,}, H = {sizes['model']['hidden_size']:,}, "
        f"V = {sizes['model']['vocab_size']:,}, {sizes['dtype']}, {device['name']}, {content['torch_threads']} threads, "
        f"torch {content['versions']['torch']}"
    )
    return _markdown([head, "median", "x three bare products", "peak extra memory"], rows)


def sync_table() -> str:
    """New weights in vLLM, from the end of the optimiser's step to the first token."""
    content = _read("cpu/sync.json")
    rows = []
    for case in content["cases"]:
        layers = "" if case["layers"] == case["layers_whole"] else f", {case['layers']} of {case['layers_whole']} layers"
        times = {name: report.duration(row["p50_ms"]) for name, row in case["rows"].items()}
        ours = f"{times['grpo_fast']}, of it probe {report.duration(case['probe_ms'])}"
        rivals = [times.get(name, "") for name in ("reload_weights", "safetensors")]
        engine = case["engine"] + ", sparse" * (case["transport"] == "sparse")
        rows.append([f"{case['layout']}{layers}, {engine}", f"{case['num_bytes'] / 1e9:.2f} GB", ours, *rivals])
    head = f"from the optimiser's step to the first token, {content['device']}, {content['cores']} cores"
    return _markdown([head, "weights", "sync", "unproven: vLLM's reload", "unproven: safetensors on a RAM disk"], rows)


MADE: dict[str, Callable[[], str]] = {
    "highlights": highlights,
    "step_table": step_table,
    "ops_table": ops_table,
    "early_stop_table": early_stop_table,
    "law_table": law_table,
    "interval_table": interval_table,
    "stop_table": stop_table,
    "sync_table": sync_table,
}


def rendered(page: Path) -> str:
    """A page with what is generated of it as the results have it."""
    return _MARKED.sub(lambda match: match[1] + MADE[match["name"]]() + match[3], page.read_text(encoding="utf-8"))


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |\n" for cells in [head, *rows]]
    return lines[0] + "|---" * len(head) + "|\n" + "".join(lines[1:])


def _interval(figure: list[float]) -> str:
    return f"{figure[0]:.2f} ({figure[1]:.2f} to {figure[2]:.2f})"


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content


def pages() -> dict[Path, str]:
    """Every generated file, as the results have it."""
    return {
        **{page: rendered(page) for page in (README, *sorted(DOCS.glob("*.md")))},
        RESULTS_PAGE: "\n".join([report.page(), transfer.section(), rollout.section(), system.section()]),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    made = pages()
    if parser.parse_args().check:
        sys.exit(any(not path.exists() or path.read_text(encoding="utf-8") != text for path, text in made.items()))
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
