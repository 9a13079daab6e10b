"""Tokens per second of rollouts by vLLM: this engine, plain vLLM and TRL's engine on the same vLLM, round by round in turns.

``python -m benchmarks.rollout.tokens``; TRL's takes part where TRL is importable. "plain vLLM" is ``LLM.generate`` with the
very requests that the engine makes, seeds and log-probabilities included, so that both sample the same tokens in the same
steps; what the engine adds are completions with text, versions and finish reasons. TRL asks once for each completion, without a
seed; its code runs unchanged on this ``LLM``. With ``--host server`` all ask one server: plain vLLM's requests are the engine's
again, sent by the client library of vLLM's own benchmark, TRL's are its client's, and the server's processor time counts.

The order is drawn anew every round, since who comes after whom can matter. Processor time is taken beside wall time: the fairer
number where other jobs share the cores. Shares of plain vLLM's rate are medians over rounds, with an interval that holds the
true median with 95 %. What is spent outside vLLM's own steps and its taking of requests, or outside the server, is counted
apart, which no noise hides.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from vllm import SamplingParams as VLLMSamplingParams

from benchmarks.ops.store import commit, today
from benchmarks.rollout.models import CONTEXT, LAYOUTS, any_tokenizer
from benchmarks.rollout.served import Rival, processor_clock, served
from benchmarks.rollout.served import plain_rival as http_rival
from benchmarks.rollout.served import trl_rival as trl_client_rival
from grpo_fast.assets import embedded_model_dir
from grpo_fast.device import device_facts, versions
from grpo_fast.rollout import SamplingParams
from grpo_fast.rollout.vllm_engine import VLLMEngine, VLLMServerEngine, VLLMSettings
from grpo_fast.rollout.vllm_in_process import REQUEST_PARAMS

OUTPUT = Path(__file__).parents[1] / "results" / "cpu" / "rollout_tokens.json"
TRL = f"TRL {metadata.version('trl')}" if util.find_spec("trl") is not None else ""
Asked = tuple[list[list[int]], SamplingParams, int]
"""Prompts, how to sample, and how many completions of each."""
Rates = dict[str, list[tuple[float, float]]]
Found = tuple[Rates, dict[str, float]]
"""Rates of all, and the share of processor time outside vLLM of two."""


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
            VLLMSamplingParams(**REQUEST_PARAMS, **each)
            for each in engine._params(sampling, generations, seed, 0, [sampling.max_tokens] * len(prompts))
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


def take_turns(calls: Mapping[str, Rival], rounds: int, clock: Callable[[], float]) -> Rates:
    """Tokens per second of wall and of processor time, of every rival and round, after one round that warms up."""
    rates: Rates = {label: [] for label in calls}
    labels = list(calls)
    for seed in range(rounds + 1):
        counts = {}
        for label in random.Random(seed).sample(labels, len(labels)):
            wall, cpu = time.perf_counter(), clock()
            counts[label] = calls[label](seed)
            seconds = time.perf_counter() - wall, clock() - cpu
            if seed:
                rates[label].append((counts[label] / seconds[0], counts[label] / seconds[1]))
        if counts["grpo_fast"] != counts["plain vLLM"]:
            raise RuntimeError(f"the same requests gave {counts}: they are not the same")
    return rates


def shares(own: Sequence[tuple[float, float]], plain: Sequence[tuple[float, float]]) -> dict[str, list[float]]:
    """Median of the rounds' ratios, with its 95 % interval from order statistics, by wall and by processor time."""
    reach = math.ceil(0.98 * math.sqrt(len(own)))  # half the interval's width, in ranks: 1.96 deviations of Binomial(n, 1/2)
    found = {}
    for name, which in (("wall", 0), ("processor", 1)):
        ratios = sorted(mine[which] / theirs[which] for mine, theirs in zip(own, plain, strict=True))
        middle = (len(ratios) - 1) / 2
        low, high = max(0, math.floor(middle - reach)), min(len(ratios) - 1, math.ceil(middle + reach))
        found[name] = [statistics.median(ratios), ratios[low], ratios[high]]
    return found


def outside_vllm(engine: VLLMEngine, call: Rival, rounds: int = 30) -> float:
    """Median share of a call's processor time that vLLM's engine has no part in."""
    core: Any = engine._vllm._llm.llm_engine
    inside = 0.0

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            begin = time.process_time()
            try:
                return work(*args, **kwargs)
            finally:
                inside += time.process_time() - begin

        return run

    found = []
    core.step, core.add_request = timed(core.step), timed(core.add_request)
    try:
        for seed in range(1, rounds + 1):
            inside, begin = 0.0, time.process_time()
            call(seed)
            found.append(1 - inside / (time.process_time() - begin))
    finally:
        del core.step, core.add_request  # the class's own are seen again
    return statistics.median(found)


def client_share(clock: Callable[[], float], call: Rival, rounds: int = 30) -> float:
    """Median share of the processor time of a call, with the server's, that is this process's."""
    found = []
    for seed in range(1, rounds + 1):
        begin, own = clock(), time.process_time()
        call(seed)
        own, whole = time.process_time() - own, clock() - begin
        found.append(own / whole)
    return statistics.median(found)


def in_process(model: PreTrainedModel, asked: Asked, dtype: torch.dtype | None, rounds: int) -> Found:
    """Every rival on the ``LLM`` of the engine, once a round."""
    settings = VLLMSettings(max_length=CONTEXT)
    engine = VLLMEngine(model, any_tokenizer(), autocast_dtype=dtype, settings=settings)
    rivals = {"grpo_fast": engine_rival, "plain vLLM": plain_rival} | ({TRL: trl_rival} if TRL else {})
    calls = {label: make(engine, *asked) for label, make in rivals.items()}
    try:
        rates = take_turns(calls, rounds, time.process_time)
        return rates, {label: outside_vllm(engine, calls[label]) for label in ("grpo_fast", "plain vLLM")}
    finally:
        engine.close()


def on_a_server(model: PreTrainedModel, asked: Asked, dtype: torch.dtype | None, rounds: int) -> Found:
    """Every rival over one server, once a round."""
    with served(model, dtype=dtype or torch.float32) as (url, process):
        engine = VLLMServerEngine(model, any_tokenizer(), urls=[url], autocast_dtype=dtype)
        rivals = {"grpo_fast": engine_rival, "plain vLLM": http_rival} | ({TRL: trl_client_rival} if TRL else {})
        calls = {label: make(engine, *asked) for label, make in rivals.items()}
        clock = processor_clock(process)
        try:
            rates = take_turns(calls, rounds, clock)
            return rates, {label: client_share(clock, calls[label]) for label in ("grpo_fast", "plain vLLM")}
        finally:
            engine.close()


HOSTS = {"in": ("in process", in_process), "server": ("server", on_a_server)}


def measure(name: str, num_layers: int | None, given: argparse.Namespace) -> dict[str, Any]:
    """One model with one kind of engine: every rival once a round."""
    if name == "embedded":
        model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    else:
        model = LAYOUTS[name].build(num_layers or LAYOUTS[name].num_layers)
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 60) for _ in range(draw.randint(16, 24))] for _ in range(given.prompts)]
    host, take = HOSTS[given.host]
    asked = prompts, SamplingParams(max_tokens=given.max_tokens), given.generations
    rates, outside = take(model, asked, None if name == "embedded" else torch.bfloat16, given.rounds)
    medians = {label: [statistics.median(values) for values in zip(*rows, strict=True)] for label, rows in rates.items()}
    return {
        "model": name if name == "embedded" else f"{LAYOUTS[name].name}, {num_layers or LAYOUTS[name].num_layers} layers",
        "engine": host,
        "prompts": given.prompts,
        "generations": given.generations,
        "max_tokens": given.max_tokens,
        "tokens_per_s": {label: wall for label, (wall, _) in medians.items()},
        "tokens_per_cpu_s": {label: cpu for label, (_, cpu) in medians.items()},
        "share_of_plain": shares(rates["grpo_fast"], rates["plain vLLM"]),
        "processor_share_outside_vllm": outside,
        "torch_threads": torch.get_num_threads(),
        "rounds": given.rounds,
        "commit": commit(),
        "date": today(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", choices=["embedded", *LAYOUTS])
    parser.add_argument("--host", choices=HOSTS, default="in")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    found = measure(given.model, given.layers, given)
    print(json.dumps(found, indent=1))
    kept = json.loads(given.output.read_text(encoding="utf-8"))["cases"] if given.output.exists() else []
    cases = [case for case in kept if any(case[key] != found[key] for key in ("model", "engine"))] + [found]
    content = {"device": device_facts().name, "cores": os.cpu_count(), "versions": versions(), "cases": cases}
    given.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
