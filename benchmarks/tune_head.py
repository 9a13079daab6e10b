"""Fills the table that says how a head is computed: ``python -m benchmarks.tune_head`` on a GPU.

For each head and size of chunk, tier 1 and tier 2 in several tiles make the same block: E, its sums and the log-probabilities,
and what a pass without E makes. A candidate is held against float64 first, on inputs like a trained model's; one that is wrong
or does not run gets no time and is listed with its reason. The others take turns. The fastest with E wins: both passes of a
step have to go the same way, so that the ratio of an unchanged policy is 1 to the bit.

``grpo_fast/ops/head_shapes.json`` keeps what other devices, types and heads have; an entry names device, versions, commit and
date. ``--smoke`` does all of it in miniature, on a CPU through Triton's interpreter, and writes where it is told to.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops import store
from benchmarks.ops.cases import MODELS, QWEN_3B, HeadCase, Model
from benchmarks.ops.inputs import HeadRows, head_rows
from benchmarks.ops.measure import Clock, quantiles, take_turns
from benchmarks.ops.truth import accumulation_error
from grpo_fast.device import device_facts, versions
from grpo_fast.ops import head_shapes, jit
from grpo_fast.ops.head_pass import row_statistics
from grpo_fast.ops.head_shapes import Choice, Key, Tile, copies_tiles, default_tile
from grpo_fast.ops.head_triton import TritonHeadPass
from grpo_fast.ops.lm_head import LMHead
from grpo_fast.ops.token_logprob import token_logprob_reference

TABLE = Path(head_shapes.__file__).parent / head_shapes.TABLE
ROWS = (2048, 8192)
CHECKED_ROWS = 64
ALLOWED_RATIO, ALLOWED_ERROR = 4.0, 2e-6
"""Times the error of the float32 specification, and beyond it and what tensor cores cut off."""
ALLOWED_ANYWHERE, ALLOWED_SHARE_ERROR = 1e-4, 2e-5
"""Nats, in rows that only float64 is asked about; and relative, of a probability, beyond the rounding of its type."""
ROWS_OF_SMOKE = (16,)
SMOKE_MODEL = Model("tiny", 24, 131)


def tiles(arch: int, *, smoke: bool) -> list[Tile]:
    """Tiles of tier 2 to try, the default first."""
    if smoke:
        return [Tile(32, 64, 16, 1, 3, 4, persistent=True), Tile(64, 32, 16, 0, 3, 4, persistent=False)]
    default = default_tile(arch, wide=True, aligned=True)
    if not copies_tiles(arch):
        return [
            default,
            Tile(128, 128, 32, 1, 4, 4, persistent=False),
            Tile(128, 128, 64, 1, 3, 8, persistent=True),
            Tile(128, 256, 32, 2, 3, 8, persistent=False),
            Tile(64, 128, 64, 1, 4, 4, persistent=False),
        ]
    tried = [
        default,
        default._replace(num_stages=3),
        default._replace(persistent=False),
        default._replace(splits=2),
        Tile(128, 128, 64, 2, 4, 8, persistent=True),
        Tile(128, 128, 64, 3, 3, 4, persistent=False),  # two programs a multiprocessor
        Tile(256, 128, 64, 3, 3, 8, persistent=True),
        Tile(128, 64, 64, 0, 4, 8, persistent=False),
    ]
    return list(dict.fromkeys(tried))  # one architecture's default is another's variant


def candidates(arch: int, *, smoke: bool) -> dict[str, Choice]:
    """By name: tier 1, and tier 2 in each tile."""
    found = {"tier 1": Choice(1, default_tile(arch, wide=True, aligned=True), measured=False)}
    for tile in tiles(arch, smoke=smoke):
        found["tier 2, " + "x".join(str(int(number)) for number in tile)] = Choice(2, tile, measured=False)
    return found


def complaint(work: TritonHeadPass, rows: HeadRows) -> str | None:
    """What is wrong with a candidate's block, in words; ``None`` where nothing is."""
    count = len(rows.targets)
    block = work.block(slice(0, count), want_entropy=True, want_exp=True)
    statistics = row_statistics(block)
    assert block.exp is not None
    # Rows out of every tile, and all columns of them.
    index = torch.linspace(0, count - 1, min(count, CHECKED_ROWS), device=rows.targets.device).long()
    logits = rows.hidden[index].double() @ rows.weight.double().T
    cut = _cut(rows, torch.maximum(logits.abs().max(), rows.log_total.abs().max()).item())
    errors = (statistics.logprobs - rows.logprobs).abs()
    base, _ = token_logprob_reference(
        rows.hidden[index].float(), LMHead(rows.weight.float()), targets=rows.targets[index], want_entropy=False
    )
    allowed = ALLOWED_RATIO * (base - rows.logprobs[index]).abs().max() + ALLOWED_ERROR + cut
    shares = (logits - rows.log_total[index, None]).exp().scatter(1, rows.targets[index, None], 0.0)
    made = block.exp[index] / statistics.total[index, None]
    rounding = (torch.finfo(block.exp.dtype).eps + ALLOWED_SHARE_ERROR + cut) * shares
    scoring = row_statistics(work.block(slice(0, count), want_entropy=False, want_exp=False)).logprobs
    checks = {
        "log-probabilities": bool(errors[index].max() <= allowed) and bool(errors.max() <= ALLOWED_ANYWHERE + cut),
        "E": bool(((made - shares).abs() <= rounding + ALLOWED_ERROR).all()),
        "log-probabilities of a pass without E": torch.equal(scoring, statistics.logprobs),
    }
    wrong = [name for name, right in checks.items() if not right]
    return f"{' and '.join(wrong)} wrong" if wrong else None


def _cut(rows: HeadRows, largest_logit: float) -> float:
    """Nats that tensor cores may be off by beside the float32 specification, which takes none."""
    if not rows.hidden.is_cuda:
        return 0.0
    return accumulation_error(rows.hidden.shape[1], largest_logit)


def measure(model: Model, num_rows: int, dtype: str, *, clock: Clock, smoke: bool, allowance_s: float) -> dict[str, Any]:
    """The table's entry of one head and size of chunk."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = head_rows(HeadCase(model, num_rows, "forward", dtype=dtype), device)  # type: ignore[arg-type]
    width = rows.weight.dtype.itemsize + 0.5
    head = LMHead(rows.weight, chunk_bytes=int(num_rows * model.vocab_size * width))
    works: dict[str, TritonHeadPass] = {}
    refused: dict[str, str] = {}
    tried = candidates(jit.target(device).arch, smoke=smoke)
    buffer: torch.Tensor | None = None
    for name, choice in tried.items():
        work = TritonHeadPass(rows.hidden, head, targets=rows.targets, choice=choice)
        work._exp = buffer  # one for all: nine times E would not fit into small devices
        try:
            wrong = complaint(work, rows)
        except Exception as error:  # a tile that does not compile, or asks for more than a program may have
            wrong = _named(error)
        if wrong is None:
            works[name], buffer = work, work._exp
        else:
            refused[name] = wrong
    everything = slice(0, num_rows)
    times: dict[str, dict[str, dict[str, float]]] = {}
    for kind, kept in (("stored", True), ("forward", False)):
        calls = {
            name: functools.partial(work.block, everything, want_entropy=True, want_exp=kept) for name, work in works.items()
        }
        readings, failures = take_turns(clock, calls, allowance_s=allowance_s)
        times[kind] = {name: quantiles(values) for name, values in readings.items()}
        refused |= {name: f"while it was timed, {_named(error)}" for name, error in failures.items()}
    right = {name: work for name, work in works.items() if name not in refused}
    if not right:
        raise RuntimeError(f"no candidate runs and is right: {refused}")
    times = {kind: {name: each for name, each in found.items() if name in right} for kind, found in times.items()}
    best = min(right, key=lambda name: times["stored"][name]["p50_ms"])
    max_rows = right[best].max_rows
    key = Key(jit.target(device).arch, dtype, model.hidden_size, model.vocab_size, max_rows, plain=True)
    return {
        **key._asdict(),
        "tier": tried[best].tier,
        "tile": list(tried[best].tile),
        "model": model.name,
        "times": times,
        "refused": refused,
    }


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def merged(known: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is known with what is new, which replaces entries of the same key; in the order of the keys."""
    entries = {head_shapes.key_of(entry): entry for entry in [*known, *new]}
    return [entries[key] for key in sorted(entries)]


def write(path: Path, new: list[dict[str, Any]]) -> None:
    """Rewrites a table with entries added to it."""
    known = json.loads(path.read_text(encoding="utf-8"))["measured"] if path.exists() else []
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps({"measured": merged(known, new)}, indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Measures what was asked for, writing the table after each entry; returns 1 where one could not be made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="*", help="names of models of benchmarks/ops/cases.py; all by default")
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS), help="sizes of chunks")
    parser.add_argument("--allowance", type=float, default=3.0, help="seconds of timing an entry and pass")
    parser.add_argument("--output", type=Path, help="instead of the package's table, as where the tree is not kept")
    parser.add_argument("--smoke", action="store_true", help="in miniature, on a CPU too; needs --output")
    options = parser.parse_args(arguments)
    if options.smoke and options.output is None:
        parser.error("--smoke needs --output: what it measures is nobody's table")
    if not options.smoke and not torch.cuda.is_available():
        parser.error("there is no CUDA device to measure; --smoke runs everything in miniature")
    if not torch.cuda.is_available() and not jit.interpreted():
        parser.error("set TRITON_INTERPRET=1: without a GPU, kernels run in Triton's interpreter only")
    models = [SMOKE_MODEL] if options.smoke else [QWEN_3B, *MODELS]
    if options.models:
        models = [model for model in models if model.name in options.models]
    facts = device_facts("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock(torch.device(facts.kind))
    origin = {"device": facts.name, "versions": versions(), "commit": store.commit(), "date": store.today()}
    failed = False
    for model in models:
        for num_rows in ROWS_OF_SMOKE if options.smoke else options.rows:
            # Of the types that both tiers take, the one that Triton's interpreter multiplies right.
            dtype = "float16" if options.smoke else "bfloat16"
            try:
                entry = measure(model, num_rows, dtype, clock=clock, smoke=options.smoke, allowance_s=options.allowance)
            except Exception as error:  # the other heads are measured all the same
                failed = True
                print(f"{model.name}, {num_rows} rows: no entry, {type(error).__name__}: {error}", flush=True)
                continue
            write(options.output or TABLE, [entry | origin])
            stored, forward = entry["times"]["stored"], entry["times"]["forward"]
            print(f"{model.name}, {num_rows} rows: tier {entry['tier']}", flush=True)
            for name in sorted(stored, key=lambda name: stored[name]["p50_ms"]):
                print(f"  {stored[name]['p50_ms']:9.3f} ms  {forward[name]['p50_ms']:9.3f} ms forward  {name}")
            for name, reason in entry["refused"].items():
                print(f"  refused: {name}: {reason}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
