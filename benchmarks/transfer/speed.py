"""Weight pack, delta and packing beside the machine's own copy and the plain ways: ``python -m benchmarks.transfer.speed``.

Parameter lists are those of published models, with as many layers as fit the memory. Contenders take turns; results are first
held against the PyTorch reference bit by bit. "Copy" is the faster of two copies that move as many bytes as the case reads and
writes: ``torch.Tensor.copy_``, and on a CPU the C library's ``memmove`` on as many threads as torch has.

The file is rewritten after every case. One that fails is told and loses no other; what ``--budget`` does not reach is named.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops.measure import Clock, quantiles, take_turns
from benchmarks.ops.store import commit, default_path, today
from grpo_fast.device import device_facts, versions
from grpo_fast.ops import native, pack_sequences, pack_weights, plan_buckets, slot_values, weight_delta
from grpo_fast.ops.packing import pack_shared_prompts

Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Transformer:
    """What the shapes of a model's parameters follow from."""

    name: str
    hidden_size: int
    intermediate_size: int
    kv_size: int
    vocab_size: int
    num_layers: int
    attention_bias: bool = False

    def shapes(self) -> list[tuple[int, ...]]:
        """Of every parameter, the head tied to the embeddings, as ``named_parameters`` has them."""
        hidden, kv, inner = self.hidden_size, self.kv_size, self.intermediate_size
        layer: list[tuple[int, ...]] = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
        layer += [(hidden,), (kv,), (kv,)] * self.attention_bias
        layer += [(inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
        return [(self.vocab_size, hidden), *layer * self.num_layers, (hidden,)]


MODELS = (
    Transformer("Qwen2.5-0.5B", 896, 4864, 128, 151_936, 24, attention_bias=True),
    Transformer("Llama-3.1-8B, 2 of 32 layers", 4096, 14_336, 1024, 128_256, 2),
)
SMOKE = (Transformer("miniature", 64, 128, 32, 300, 2, attention_bias=True),)


def copies(source: torch.Tensor, target: torch.Tensor) -> Calls:
    """Ways to copy bytes."""
    calls: Calls = {"copy_": lambda: target.copy_(source)}
    if source.device.type == "cpu":
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(threads)
        share = -(-len(source) // threads)
        spans = [(at, min(share, len(source) - at)) for at in range(0, len(source), share)]

        def move(span: tuple[int, int]) -> None:
            ctypes.memmove(target.data_ptr() + span[0], source.data_ptr() + span[0], span[1])

        calls["memmove"] = lambda: list(pool.map(move, spans))
    return calls


def pack_calls(model: Transformer, dtype: torch.dtype, device: torch.device) -> tuple[Calls, int]:
    """Weights of one type into one bfloat16 bucket, the compiled way and by a loop over the tensors."""
    weights = [torch.randn(shape, device=device).to(dtype) for shape in model.shapes()]
    (bucket,) = plan_buckets(weights, bucket_bytes=1 << 40)
    out, plain = pack_weights(weights, bucket, impl="native"), pack_weights(weights, bucket, impl="torch")
    assert torch.equal(out, plain)
    views = [slot_values(plain, slot)[0] for slot in bucket.slots]

    def loop() -> None:
        for view, weight in zip(views, weights, strict=True):
            view.copy_(weight)

    num_bytes = sum(weight.nbytes for weight in weights) + bucket.num_bytes
    return {"native": lambda: pack_weights(weights, bucket, out=out, impl="native"), "torch loop": loop}, num_bytes


def delta_calls(count: int, share: float, device: torch.device) -> tuple[Calls, int]:
    """Two bfloat16 buckets that differ in a share of their elements."""
    old = torch.randn(count, device=device).to(torch.bfloat16)
    new = old.clone()
    new[torch.rand(count, device=device) < share] += 1
    ours, truth = (weight_delta(old, new, impl=name) for name in ("native", "torch"))
    assert ours.checksum == truth.checksum
    assert ours.indices is not None
    assert torch.equal(ours.indices, truth.indices)
    return {name: lambda name=name: weight_delta(old, new, impl=name) for name in ("native", "torch")}, 2 * new.nbytes


def packing_calls(count: int) -> dict[str, tuple[Calls, int]]:
    """Sequences of several spreads of length, and groups of eight behind shared prompts."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.randint(1, 4097, (count,), generator=generator)
    long = torch.randint(3000, 10_000, (count,), generator=generator)
    prompts, owner = torch.randint(20, 500, (count // 8 + 1,), generator=generator), torch.arange(count) // 8
    return {
        f"{count:,} lengths 1 to 4,096": ({"native": lambda: pack_sequences(uniform, 16_384, impl="native")}, 0),
        f"{count:,} lengths 3,000 to 9,999": ({"native": lambda: pack_sequences(long, 16_384, impl="native")}, 0),
        f"{count:,} completions of {count // 8 + 1:,} prompts": (
            {"native": lambda: pack_shared_prompts(prompts, uniform // 4 + 1, owner, token_budget=16_384, impl="native")},
            0,
        ),
    }


def run(name: str, calls: Calls, num_bytes: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Times one case's contenders in turns with the copies of as many bytes."""
    if num_bytes:
        source = torch.ones(num_bytes // 2, dtype=torch.uint8, device=device)
        calls = calls | copies(source, torch.zeros_like(source))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if num_bytes else 1)  # a plan is the host's work beside a step: it gets one thread
    for call in calls.values():
        call()
    readings, failures = take_turns(Clock(device), calls, allowance_s=0, min_rounds=rounds, max_rounds=rounds)
    torch.set_num_threads(threads)
    assert not failures, failures
    rows = {contender: quantiles(values) for contender, values in readings.items()}
    record: dict[str, Any] = {"case": name, "num_bytes": num_bytes, "rows": rows, "commit": commit(), "date": today()}
    if num_bytes:
        copy = min(rows[way]["p50_ms"] for way in rows.keys() & {"copy_", "memmove"})
        record["share_of_copy"] = copy / rows["native"]["p50_ms"]
        rival = next(way for way in rows if way.startswith("torch"))
        record["times_faster"] = rows[rival]["p50_ms"] / rows["native"]["p50_ms"]
    return record


def cases(device: torch.device, *, smoke: bool) -> dict[str, Callable[[], tuple[Calls, int]]]:
    """Every case on one device, by name; its tensors are made when it is called."""
    made: dict[str, Callable[[], tuple[Calls, int]]] = {}
    for model in SMOKE if smoke else MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"pack {model.name}, {str(dtype).removeprefix('torch.')} to bfloat16"
            made[name] = partial(pack_calls, model, dtype, device)
    count = 10_000 if smoke else 1 << 28
    for share in (0.001, 0.01, 0.1):
        made[f"delta of {count:,}, {share:.1%} changed"] = partial(delta_calls, count, share, device)
    for name, case in packing_calls(1000 if smoke else 1_000_000).items():
        made[f"plan {name}"] = partial(tuple, case)
    return made


def measure(
    device: torch.device, *, smoke: bool, rounds: int, only: str = "", seconds: float = float("inf")
) -> Iterator[dict[str, Any] | str]:
    """Records of the cases whose name holds ``only``, or in words why one has none, each as soon as it is known.

    Args:
        device: whose.
        smoke: in miniature.
        rounds: readings of each contender.
        only: part of a name.
        seconds: after which no further case begins.
    """
    deadline = time.monotonic() + seconds
    for name, make in cases(device, smoke=smoke).items():
        if only not in name:
            continue
        if time.monotonic() > deadline:
            yield f"{name}: left out, {seconds:.0f} s are over; measure it with --only"
            continue
        try:
            yield run(name, *make(), device, rounds)
        except Exception as error:  # the other cases are measured all the same
            yield f"{name}: {type(error).__name__}: {error}"


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where a case has no record; 0 otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="miniatures, written nowhere")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="part of a case's name; other cases keep their results")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no further case begins")
    parser.add_argument(
        "--output", type=Path, help="instead of benchmarks/results/<device>/transfer.json, as where the tree is not kept"
    )
    given = parser.parse_args(arguments)
    if problem := native.load():
        raise SystemExit(problem)
    facts = device_facts()
    device = torch.device(facts.kind)
    output = None if given.smoke else given.output or default_path(facts).with_name("transfer.json")
    header = {"device": facts.name, "threads": torch.get_num_threads(), "versions": versions()}
    kept = json.loads(output.read_text(encoding="utf-8"))["cases"] if given.only and output and output.exists() else []
    known = {record["case"]: record for record in kept}
    failed = False
    for found in measure(device, smoke=given.smoke, rounds=given.rounds, only=given.only, seconds=given.budget):
        if isinstance(found, str):
            failed = True
            print(found, flush=True)
            continue
        times = ", ".join(f"{name} {row['p50_ms']:.3g} ms" for name, row in found["rows"].items())
        share = f" ({found['share_of_copy']:.0%} of copy)" if "share_of_copy" in found else ""
        print(f"{found['case']}: {times}{share}", flush=True)
        known[found["case"]] = found
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(header | {"cases": list(known.values())}, indent=1) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
