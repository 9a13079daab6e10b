"""Milliseconds of a decoding token's products with all weights of a model, by number of sequences.

    python -m benchmarks.rollout.few_rows [--rows 1 2 4 8 16 32] [--rounds 9] [--output FILE]

``ours`` reads the weights as they lie; ``torch`` is ``F.linear`` (MKL on an Intel processor); ``onednn`` multiplies by weights
that were laid out anew for it, which takes ``packing_ms`` once a rollout. They take turns, and each reads every weight of the
layers and of the head, far more than a cache holds. ``reading`` is torch's sum of the weights: about what memory allows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own custom)

from benchmarks.ops.store import commit, today
from grpo_fast.device import device_facts, versions
from grpo_fast.ops.decoder_layer import few_rows_product, problem
from grpo_fast.ops.products import PackedWeight


class Sizes(NamedTuple):
    """[out, in] of what is multiplied with."""

    name: str
    num_layers: int
    layer: tuple[tuple[int, int], ...]
    head: tuple[int, int]


SMOLLM2 = Sizes("SmolLM2-135M", 30, ((960, 576), (576, 576), (3072, 576), (576, 1536)), (49152, 576))


def measure(rows: list[int], rounds: int, sizes: Sizes = SMOLLM2) -> list[dict[str, float]]:
    """One entry for each number of rows: medians of milliseconds over rounds after a first one.

    Raises:
        ValueError: a product is farther than 1e-5 of the largest number from that of float64.
    """
    shapes = [*sizes.layer * sizes.num_layers, sizes.head]
    linears = [torch.nn.Linear(size, out, bias=False).requires_grad_(False) for out, size in shapes]
    weights = [linear.weight for linear in linears]
    begun = time.perf_counter()
    packed = [PackedWeight([linear]) for linear in linears]
    packing_ms = 1000 * (time.perf_counter() - begun)
    table = []
    for num_rows in rows:
        generator = torch.Generator().manual_seed(num_rows)
        inputs = {size: torch.randn(num_rows, size, generator=generator) for _, size in shapes}
        asked = [inputs[size] for _, size in shapes]
        ways = {
            "ours": lambda at, asked=asked: few_rows_product(asked[at], weights[at]),
            "torch": lambda at, asked=asked: F.linear(asked[at], weights[at]),
            "onednn": lambda at, asked=asked: packed[at](asked[at]),
        }
        for name, way in ways.items():
            for at in range(len(sizes.layer)):
                exact = F.linear(asked[at].double(), weights[at].double())
                error = ((way(at) - exact).abs().max() / exact.abs().max()).item()
                if not error < 1e-5:
                    raise ValueError(f"{name} is off by {error:g} for {num_rows} rows and a weight {list(shapes[at])}")
        times: dict[str, list[float]] = {name: [] for name in (*ways, "reading")}
        for _ in range(rounds + 1):
            for name, way in (ways | {"reading": lambda at: weights[at].sum()}).items():
                begun = time.perf_counter()
                for at in range(len(shapes)):
                    way(at)
                times[name].append(1000 * (time.perf_counter() - begun))
        medians = {f"{name}_ms": statistics.median(found[1:]) for name, found in times.items()}
        table.append({"rows": num_rows, **medians, "packing_ms": packing_ms})
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 12, 16, 24, 32])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--machine", default="", help="what else to say of the machine: quiet, shared, ...")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if obstacle := problem():
        parser.error(obstacle)
    content: dict[str, Any] = {"device": device_facts().name, "cores": os.cpu_count(), "machine": options.machine}
    content |= {"versions": versions(), "commit": commit(), "date": today(), "torch_threads": torch.get_num_threads()}
    content |= {"model": SMOLLM2.name, "rounds": options.rounds, "cases": measure(options.rows, options.rounds)}
    text = json.dumps(content, indent=1)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")
