"""Tokens per second of rollouts by vLLM: this engine, plain vLLM and TRL's engine on the same ``LLM``, round by round in turns.

``python -m benchmarks.rollout.tokens``; TRL's takes part where TRL is importable. "plain vLLM" is ``LLM.generate`` with the
very requests that the engine makes, log-probabilities included; what the engine adds are completions with text, versions and
finish reasons. TRL asks once for each completion, without a seed; its code runs unchanged on this ``LLM``. Processor time is
taken beside wall time: the fairer number where other jobs share the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams as VLLMSamplingParams

from benchmarks.ops.store import commit, today
from benchmarks.rollout.models import LAYOUTS, any_tokenizer
from grpo_fast.assets import embedded_model_dir
from grpo_fast.device import device_facts, versions
from grpo_fast.rollout import SamplingParams
from grpo_fast.rollout.vllm_engine import VLLMEngine, VLLMSettings

OUTPUT = Path(__file__).parents[1] / "results" / "cpu" / "rollout_tokens.json"
Rival = Callable[[int], int]
"""Samples with a seed and returns how many tokens it sampled."""


def engine_rival(engine: VLLMEngine, prompts: list[list[int]], sampling: SamplingParams, generations: int) -> Rival:
    def run(seed: int) -> int:
        groups = engine.generate(prompts, sampling, num_generations=generations, seed=seed)
        return sum(len(completion.token_ids) for group in groups for completion in group)

    return run


def plain_rival(engine: VLLMEngine, prompts: list[list[int]], sampling: SamplingParams, generations: int) -> Rival:
    llm: Any = engine._vllm._llm
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]

    def run(seed: int) -> int:
        params = [
            VLLMSamplingParams(logprobs=0, **engine._params(sampling, generations, seed * 1000 + number))
            for number in range(len(prompts))
        ]
        outputs = llm.generate(requests, params, use_tqdm=False)
        return sum(len(answer.token_ids) for output in outputs for answer in output.outputs)

    return run


def trl_rival(engine: VLLMEngine, prompts: list[list[int]], sampling: SamplingParams, generations: int) -> Rival:
    accelerator = import_module("accelerate").Accelerator(cpu=True)
    generation: Any = import_module("trl.generation.vllm_generation").VLLMGeneration

    class OnTheSame(generation):  # type: ignore[misc]
        def _init_vllm(self) -> None:
            self.llm = engine._vllm._llm

    theirs = OnTheSame(
        engine._model,
        accelerator,
        engine._tokenizer,
        temperature=sampling.temperature,
        max_completion_length=sampling.max_tokens,
        generation_kwargs={"ignore_eos": True, "stop_token_ids": engine._end_tokens},
    )
    repeated = [prompt for prompt in prompts for _ in range(generations)]

    def run(seed: int) -> int:
        _, completions, *_ = theirs.generate(repeated, None, generations)
        return sum(map(len, completions))

    return run


def measure(name: str, num_layers: int | None, given: argparse.Namespace) -> dict[str, Any]:
    """One model: every rival once a round, after one round that warms up."""
    if name == "embedded":
        model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    else:
        model = LAYOUTS[name].build(num_layers or LAYOUTS[name].num_layers)
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 60) for _ in range(draw.randint(16, 24))] for _ in range(given.prompts)]
    sampling = SamplingParams(max_tokens=given.max_tokens)
    dtype = None if name == "embedded" else torch.bfloat16
    engine = VLLMEngine(model, any_tokenizer(), autocast_dtype=dtype, settings=VLLMSettings(max_length=512))
    rivals = {"grpo_fast": engine_rival, "plain vLLM": plain_rival}
    if util.find_spec("trl") is not None:
        rivals[f"TRL {metadata.version('trl')}"] = trl_rival
    calls = {label: make(engine, prompts, sampling, given.generations) for label, make in rivals.items()}
    rates: dict[str, list[tuple[float, float]]] = {label: [] for label in calls}
    for seed in range(given.rounds + 1):
        for label, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            count = call(seed)
            rates[label].append((count / (time.perf_counter() - wall), count / (time.process_time() - cpu)))
    engine.close()
    medians = {label: [statistics.median(values) for values in zip(*rows[1:], strict=True)] for label, rows in rates.items()}
    return {
        "model": name if name == "embedded" else f"{LAYOUTS[name].name}, {num_layers or LAYOUTS[name].num_layers} layers",
        "prompts": given.prompts,
        "generations": given.generations,
        "max_tokens": given.max_tokens,
        "tokens_per_s": {label: wall for label, (wall, _) in medians.items()},
        "tokens_per_cpu_s": {label: cpu for label, (_, cpu) in medians.items()},
        "torch_threads": torch.get_num_threads(),
        "rounds": given.rounds,
        "commit": commit(),
        "date": today(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", choices=["embedded", *LAYOUTS])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    found = measure(given.model, given.layers, given)
    print(json.dumps(found, indent=1))
    kept = json.loads(given.output.read_text(encoding="utf-8"))["cases"] if given.output.exists() else []
    cases = [case for case in kept if case["model"] != found["model"]] + [found]
    content = {"device": device_facts().name, "cores": os.cpu_count(), "versions": versions(), "cases": cases}
    given.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
