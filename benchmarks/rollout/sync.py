"""New weights in vLLM, from ``optimizer.step`` done to the first token possible: ``python -m benchmarks.rollout.sync 0.5B``.

Weights are float32 in the trainer and bfloat16 in vLLM, as in training. Contenders take turns on one engine, each ending with
one sampled token:

- ``grpo_fast``: the whole sync, with the reset of the prefix cache and the probe that proves it; directly from the policy where
  the engine is in the trainer's process, else through shared memory: in a process of its own (``--host own``) or as a server
  (``--host server``), also with memory of its own, to which they go over the server's port (``--host elsewhere``); or what
  changed alone (``--transport sparse``), one value in a hundred;
- ``reload_weights``: vLLM's own reload from an iterator, tensor by tensor, and the reset (in this process only);
- ``safetensors``: the model saved to a RAM disk and reloaded from there, and the reset;
- ``load_weights``: the model's bare loader, tensor by tensor, which fails where vLLM has repacked a weight.

Nothing proves the others: on a CPU vLLM's reload leaves a head that is tied to the embedding as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from benchmarks.ops.measure import quantiles
from benchmarks.ops.store import commit, today
from benchmarks.rollout.models import CONTEXT, LAYOUTS, any_tokenizer
from benchmarks.rollout.served import OWN_MEMORY, WEIGHTS, save_weights, served
from grpo_fast.device import device_facts, versions
from grpo_fast.rollout import SamplingParams
from grpo_fast.rollout.transports import Transport
from grpo_fast.rollout.vllm_engine import VLLMEngine, VLLMServerEngine, VLLMSettings

OUTPUT = Path(__file__).parents[1] / "results" / "cpu" / "sync.json"
RAM_DISK = Path("/dev/shm")
DTYPE = torch.bfloat16
ENGINES = {"in": "in process", "own": "own process", "server": "server", "elsewhere": "server, other memory"}
Way = Callable[[], None]


def first_token(engine: VLLMEngine) -> None:
    engine.generate([[1, 5, 6]], SamplingParams(max_tokens=1), num_generations=1, seed=0)


def in_process_ways(model: PreTrainedModel, engine: VLLMEngine, directory: Path) -> dict[str, Way]:
    """Rivals that reach into vLLM; the token is sampled by the engine, whose own version is still in force for it."""
    llm: Any = engine._vllm._llm
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, weight.detach().to(DTYPE)) for name, weight in model.named_parameters())

    def reload(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        runner.reload_weights(weights_iterator=weights, is_checkpoint_format=True)
        llm.reset_prefix_cache()

    def round_trip() -> None:
        save_weights(model, directory, DTYPE)
        reload(load_file(directory / WEIGHTS).items())

    def bare() -> None:
        runner.model.load_weights(tensors())
        llm.reset_prefix_cache()

    return {"reload_weights": lambda: reload(tensors()), "safetensors": round_trip, "load_weights": bare}


def own_process_ways(model: PreTrainedModel, engine: VLLMEngine, directory: Path) -> dict[str, Way]:
    llm: Any = engine._vllm._llm
    # It began with dummy weights, and would read no files.
    llm.collective_rpc("update_config", args=({"load_config": {"load_format": "auto"}},))

    def round_trip() -> None:
        save_weights(model, directory, DTYPE)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(directory)})
        llm.reset_prefix_cache()

    return {"safetensors": round_trip}


@torch.no_grad()
def change_some(model: PreTrainedModel, version: int) -> None:
    """Another value of one weight in a hundred, as small updates of bfloat16 make; others keep theirs."""
    for weight in model.parameters():
        weight.view(-1)[version % 100 :: 100] *= 1.01


def server_ways(model: PreTrainedModel, engine: VLLMServerEngine, directory: Path) -> dict[str, Way]:
    server: Any = engine._vllm.servers[0]

    def round_trip() -> None:
        save_weights(model, directory, DTYPE)
        server.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}})
        server.post("/reset_prefix_cache")

    return {"safetensors": round_trip}


def take_turns(model: PreTrainedModel, engine: VLLMEngine, ways: dict[str, Way], rounds: int) -> dict[str, Any]:
    """Times every way once a round; what fails with the first try is told, not timed."""
    readings: dict[str, list[float]] = {name: [] for name in ("grpo_fast", *ways)}
    failures: dict[str, str] = {}
    syncs = []
    for version in range(1, rounds + 2):  # the first round warms up
        change_some(model, version)
        for name in list(readings):
            begin = time.perf_counter()
            try:
                if name == "grpo_fast":
                    syncs.append(engine.sync_weights(model, version))
                else:
                    ways[name]()
                first_token(engine)
            except Exception as error:  # whatever a rival fails with is its result
                failures[name] = f"{type(error).__name__}: {str(error)[:160]}"
                del readings[name]
                continue
            readings[name].append(time.perf_counter() - begin)
    rows = {name: quantiles(values[1:]) for name, values in readings.items()}
    probe_s = statistics.median(sync["sync/probe_seconds"] for sync in syncs[1:])
    num_bytes = sum(weight.numel() for weight in model.parameters()) * DTYPE.itemsize
    for row in rows.values():
        row["gb_per_s"] = num_bytes / row["p50_ms"] / 1e6
    sent_bytes = statistics.median(sync["sync/bytes"] for sync in syncs[1:])
    return {"num_bytes": num_bytes, "sent_bytes": sent_bytes, "probe_ms": 1e3 * probe_s, "rows": rows, "failures": failures}


def measure(name: str, num_layers: int | None, *, host: str, transport: Transport, rounds: int) -> dict[str, Any]:
    """One layout with one kind of engine."""
    layout = LAYOUTS[name]
    model = layout.build(num_layers or layout.num_layers)
    directory = Path(tempfile.mkdtemp(dir=RAM_DISK if RAM_DISK.is_dir() else None))
    own = host == "own"
    settings = VLLMSettings(max_length=CONTEXT, kv_cache_bytes=64 * 2**20, own_process=own, transport=transport)
    try:
        if host in {"server", "elsewhere"}:
            inside = OWN_MEMORY if host == "elsewhere" else ()
            with served(model, dtype=DTYPE, transport=transport, inside=inside) as (url, _):
                engine = VLLMServerEngine(model, any_tokenizer(), urls=[url], autocast_dtype=DTYPE, settings=settings)
                ways = {} if inside else server_ways(model, engine, directory)  # the RAM disk is not seen there
                found = take_turns(model, engine, ways, rounds)
                engine.close()
        else:
            model.config.save_pretrained(directory)
            engine = VLLMEngine(model, any_tokenizer(), autocast_dtype=DTYPE, settings=settings)
            inner = own_process_ways if own else in_process_ways
            found = take_turns(model, engine, inner(model, engine, directory), rounds)
            engine.close()
    finally:
        shutil.rmtree(directory)
    return {
        "layout": layout.name,
        "layers": num_layers or layout.num_layers,
        "layers_whole": layout.num_layers,
        "engine": ENGINES[host],
        "transport": engine._delivery.transport.replace("_", " "),
        **found,
        "rounds": rounds,
        "commit": commit(),
        "date": today(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", choices=LAYOUTS)
    parser.add_argument("--layers", type=int, help="build only as many, where memory holds no more")
    parser.add_argument("--host", choices=ENGINES, default="in")
    parser.add_argument("--transport", choices=["auto", "shared_memory", "sparse"], default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    found = measure(given.layout, given.layers, host=given.host, transport=given.transport, rounds=given.rounds)
    print(json.dumps(found, indent=1), file=sys.stderr)
    if given.layout == "miniature":
        return
    kept = json.loads(given.output.read_text(encoding="utf-8"))["cases"] if given.output.exists() else []
    same = ("layout", "engine", "transport")
    cases = [case for case in kept if any(case[key] != found[key] for key in same)] + [found]
    content = {
        "device": device_facts().name,
        "cores": os.cpu_count(),
        "versions": versions(),
        "cases": sorted(cases, key=lambda case: (case["engine"], case["num_bytes"], case["transport"])),
    }
    given.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
