"""Writes what is generated from ``benchmarks/results``: the tables of the README and ``benchmarks/RESULTS.md``.

``--check`` only says whether they are up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
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
RESULTS_PAGE = Path(__file__).parent / "RESULTS.md"
_TABLE = re.compile(r"(<!-- (?P<name>(?:law |stop |ops |sync )?table): [^\n]*-->\n).*?(<!-- table end -->)", re.DOTALL)


def readme_table() -> str:
    """The first screen's table: what the embedded run does on a CPU, and what a step costs beside TRL."""
    embedded = _read("cpu/embedded_run.json")
    machines = [[_read(f"cpu/step_time{model}{machine}.json") for model in ("", "_smollm2")] for machine in ("", "_zen4")]
    runs = embedded["runs"]
    kept = [run["stop"]["accuracy"] / run["final_accuracy"] for run in runs]
    cores = embedded["device"]["num_cores"]
    rows = [
        ("held-out accuracy before training", f"{mean(run['initial_accuracy'] for run in runs):.2f}"),
        (
            "stopped by the forecast at step",
            ", ".join(str(run["stop"]["step"]) for run in runs) + f" of {runs[0]['max_steps']}",
        ),
        ("accuracy there", ", ".join(f"{run['stop']['accuracy']:.3f}" for run in runs)),
        ("accuracy after the whole budget", ", ".join(f"{run['final_accuracy']:.3f}" for run in runs)),
        ("share of it kept, worst seed", f"{min(kept):.3f}"),
        ("FLOPs saved, mean", f"{mean(1 - run['stop']['flops'] / run['flops'] for run in runs):.0%}"),
        *(_beside_trl(*results) for results in machines),
        (
            "peak memory, ours / TRL",
            "{:.1f} GiB / {:.1f} GiB; SmolLM2-135M {:.1f} GiB / {:.1f} GiB".format(
                *(result["peak_memory_mib"][name] / 1024 for result in machines[-1] for name in ("grpo_fast", "trl"))
            ),
        ),
    ]
    head = f"| embedded model, {cores} CPU cores, torch {embedded['versions']['torch']} | seeds 0, 1, 2 |\n|---|---|\n"
    return head + "".join(f"| {name} | {value} |\n" for name, value in rows)


def _beside_trl(steps: dict[str, Any], large: dict[str, Any]) -> tuple[str, str]:
    """Median steps of one machine, of the embedded model and of SmolLM2-135M."""
    told = [
        "{:.{digits}f} {unit} / {:.{digits}f} {unit} ({:.1f}x)".format(
            *(scale * result[name]["p50"] for name in ("grpo_fast_step_s", "trl_step_s")),
            result["median_ratio_trl_over_ours"],
            digits=digits,
            unit=unit,
        )
        for result, scale, digits, unit in ((steps, 1e3, 0, "ms"), (large, 1, 1, "s"))
    ]
    name = f"median step, ours / TRL {steps['versions']['trl']}: {steps['machine']}"
    return name, f"{told[0]}; SmolLM2-135M {told[1]}"


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
        rows += [("best rival at that point", best), ("ratio, 90 % interval", [_interval(row["ratio"]) for row in rivals])]
        rows.append(("ratio to the rival that is best elsewhere", [_interval(row["chosen"]) for row in rivals]))
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


def stop_table() -> str:
    """The law's stop against simple ones, replayed on the same curves."""
    found = _read("law/published.json")
    rules = found["stopping"]["all"]
    names = [found["stop_rule"], "patience 20%", "patience 10%", "fixed 40%", "fixed 80%", "plug-in, exponential + R0"]
    rows = []
    for name in [*names, "hindsight oracle"]:
        row = {measure: rules[name][measure][0] for measure in ("saved", "lost", "false", "bad")}
        rows.append([name, f"{row['saved']:.0%}", f"{row['lost']:.4f}", f"{row['false']:.1%}", f"{row['bad']:.1%}"])
    return _markdown(["rule", "compute saved", "mean reward lost", "lost over 0.02", "lost over 0.05"], rows)


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


def rendered_readme() -> str:
    """The README with its tables as the results have them."""
    text = README.read_text(encoding="utf-8")
    made = {"table": readme_table, "law table": law_table, "stop table": stop_table, "ops table": ops_table}
    made["sync table"] = sync_table
    return _TABLE.sub(lambda match: match[1] + made[match["name"]]() + match[3], text)


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
        README: rendered_readme(),
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
