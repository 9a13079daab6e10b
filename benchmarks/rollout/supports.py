"""How many tokens ``top_p`` and ``min_p`` keep on a real model, and what it costs to be told of few or many of them at first.

``python -m benchmarks.rollout.supports MODEL GSM8K``: a model's directory (``benchmarks/system/smollm2.py`` writes one) and the
one of GSM8K's files, whose questions are asked as in training, through the chat template. Of every setting all supports are
read whole. From them follows, for each number of likeliest tokens that may be asked for first, of which share of the tokens it
would not tell all that was kept, so that they are asked for again, and what share of the completions has such a token.

The cost is processor time a token of the engine's whole answer, what is asked again included, for the same requests with other
numbers asked for first, in turns; beside it, what cutting alone costs, with no likeliest token told, and no cut at all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.ops.store import commit, today
from benchmarks.rollout.served import processor_clock, served
from grpo_fast.config import Config
from grpo_fast.device import device_facts, versions
from grpo_fast.rollout import SamplingParams, vllm_sample
from grpo_fast.rollout.vllm_engine import VLLMEngine, VLLMServerEngine, VLLMSettings
from grpo_fast.tasks import encode_prompts, load_task

OUTPUT = Path(__file__).parents[1] / "results" / "cpu" / "cut_supports.json"
TEMPERATURES = (0.7, 1.0, 1.2)
CUTS: list[dict[str, float]] = [{"top_p": share} for share in (0.8, 0.9, 0.95, 0.99)] + [
    {"min_p": share} for share in (0.05, 0.1)
]
TOLD = (64, 256, 1024, 4096)
"""Numbers of likeliest tokens that might be asked for first."""
COSTS = [(1.0, {"top_p": 0.8}), (1.0, {"top_p": 0.95}), (1.0, {"min_p": 0.05})]
"""Settings whose cost is measured: temperature and cut."""


def supports(engine: VLLMEngine, prompts: list[list[int]], sampling: SamplingParams, generations: int) -> list[Any]:
    """How many tokens were kept at each position of every completion."""
    found = engine.generate(prompts, sampling, num_generations=generations, seed=0)
    return [completion.kept.sizes for group in found for completion in group if completion.kept is not None]


def describe(sizes: list[npt.NDArray[np.int32]]) -> dict[str, Any]:
    """Widths of the supports, and how often a number told at first would not have been more than them."""
    every = np.concatenate(sizes)
    return {
        "tokens": len(every),
        "completions": len(sizes),
        "mean": float(every.mean()),
        "median": float(np.median(every)),
        "p99": float(np.quantile(every, 0.99)),
        "widest": int(every.max()),
        "tokens_short": {str(told): float((every >= told).mean()) for told in TOLD},
        "completions_short": {str(told): statistics.fmean(float(each.max() >= told) for each in sizes) for told in TOLD},
    }


def costs(
    engine: VLLMEngine, asked: tuple[list[list[int]], SamplingParams, int], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median microseconds of processor time a token, by how many tokens are asked for first; ``cut alone`` asks for none."""
    prompts, sampling, generations = asked
    params, whole = (
        engine._params(each, generations, 0, 0, [each.max_tokens] * len(prompts))
        for each in (sampling, replace(sampling, top_p=1.0, min_p=0.0))
    )
    untold = {"no cut": whole, "cut alone": [{name: each[name] for name in each if name != "logprobs"} for each in params]}
    readings: dict[str, list[float]] = {**{label: [] for label in untold}, **{str(told): [] for told in TOLD}}
    labels = list(readings)
    for number in range(rounds + 1):
        for label in labels[number % len(labels) :] + labels[: number % len(labels)]:
            begin = clock()
            if label in untold:
                found = engine._vllm.sample(prompts, untold[label])
            else:
                told = [each | {"logprobs": min(int(label), engine._vocabulary)} for each in params]
                found = vllm_sample.sample_whole(engine._vllm.sample, prompts, told, engine._vocabulary)
            if number:  # the first round warms up
                tokens = sum(len(each.token_ids) for group in found for each in group)
                readings[label].append(1e6 * (clock() - begin) / tokens)
    return {label: statistics.median(values) for label, values in readings.items()}


def questions(model: Path, gsm8k: Path, count: int) -> list[list[int]]:
    """The first of GSM8K's held-out questions, as token ids."""
    task = load_task(Config(model=str(model), dataset=f"gsm8k:{gsm8k}"), chat=True)
    rows = [task.eval[place] for place in range(count)]
    return [list(prompt.token_ids) for prompt in encode_prompts(rows, AutoTokenizer.from_pretrained(model))]


def widths(engine: VLLMEngine, prompts: list[list[int]], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Supports of every setting."""
    cases = []
    for temperature in given.temperatures:
        for cut in CUTS:
            sampling = SamplingParams(max_tokens=given.max_tokens, temperature=temperature, **cut)
            cases.append(
                {"temperature": temperature, **cut, **describe(supports(engine, prompts, sampling, given.generations))}
            )
            print(json.dumps(cases[-1]), flush=True)
    return cases


def timed(
    engine: VLLMEngine, prompts: list[list[int]], given: argparse.Namespace, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """What some settings cost on an engine."""
    cases = []
    for temperature, cut in COSTS:
        asked = prompts[: given.timed_prompts], SamplingParams(max_tokens=given.max_tokens, temperature=temperature, **cut)
        found = costs(engine, (*asked, given.generations), given.rounds, clock)
        cases.append({"temperature": temperature, **cut, "cpu_us_per_token": found, "rounds": given.rounds})
        print(json.dumps(cases[-1]), flush=True)
    return cases


def measure(model: Path, prompts: list[list[int]], given: argparse.Namespace) -> dict[str, Any]:
    """In this process the supports of all settings and the cost of some; on a server that cost alone."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = VLLMSettings(max_length=max(map(len, prompts)) + given.max_tokens)
    if given.host == "server":
        with served(policy, dtype=torch.bfloat16) as (url, process):
            engine = VLLMServerEngine(policy, tokenizer, urls=[url], settings=settings)
            found = {"server": timed(engine, prompts, given, processor_clock(process))}
            engine.close()
        return found
    engine = VLLMEngine(policy, tokenizer, settings=settings)
    try:
        return {"cases": widths(engine, prompts, given), "in process": timed(engine, prompts, given, time.process_time)}
    finally:
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("gsm8k", type=Path)
    parser.add_argument("--host", choices=["in", "server"], default="in")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--generations", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timed-prompts", type=int, default=4)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    found = measure(given.model, questions(given.model, given.gsm8k, given.prompts), given)
    kept = json.loads(given.output.read_text(encoding="utf-8")) if given.output.exists() else {}
    content = kept | {
        "model": "SmolLM2-135M-Instruct",
        "device": device_facts().name,
        "cores": os.cpu_count(),
        "versions": versions(),
        "max_tokens": given.max_tokens,
        **found,
        "commit": commit(),
        "date": today(),
    }
    given.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
