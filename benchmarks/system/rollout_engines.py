"""Tokens per second of the transformers engine against ``generate`` and ``generate_batch`` of transformers itself.

    python benchmarks/system/rollout_engines.py [--model DIR] [--prompts 16] [--generations 8] [--max-tokens 32] [--full-length]

Rivals run in turn, round by round, in one process, so that a busy machine slows all of them alike. Wall time is what a user
waits; CPU time is given beside it, as the fairer number where other jobs share the cores. Prompts are random tokens of ragged
length.

Measured on 23 November 2026, one thread of an AMD EPYC, torch 2.13, transformers 5.23, the embedded model, 16 prompts of 16 to
24 tokens, 8 completions each, at most 32 tokens:

- with its end token (540 tokens a round): engine 11,400 tokens/s, its module path 8,500, ``generate`` 2,400: 4.7x and 3.5x;
- with ``--full-length`` (4,096 tokens a round): 29,100, 20,200 and 14,800 tokens/s: 2.0x and 1.4x.

A negative result: continuous batching (``generate_batch``, ``--continuous``) runs on a CPU but gives 60 tokens/s, a fortieth of
``generate``, so the engine does not use it. It returns no log-probabilities at the sampling temperature either.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from grpo_fast.assets import embedded_model_dir
from grpo_fast.rollout import SamplingParams
from grpo_fast.rollout.transformers_engine import TransformersEngine

Rival = Callable[[int], int]
"""Samples with a seed and returns how many tokens it sampled."""


def engine_rival(model: Any, tokenizer: Any, prompts: list[list[int]], options: argparse.Namespace, impl: Any) -> Rival:
    engine = TransformersEngine(model, tokenizer, eos_token_ids=[] if options.full_length else None, impl=impl)
    sampling = SamplingParams(max_tokens=options.max_tokens)

    def run(seed: int) -> int:
        groups = engine.generate(prompts, sampling, num_generations=options.generations, seed=seed)
        return sum(len(completion.token_ids) for group in groups for completion in group)

    return run


def generate_rival(model: Any, tokenizer: Any, prompts: list[list[int]], options: argparse.Namespace) -> Rival:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    end = -1 if options.full_length else tokenizer.eos_token_id

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        answer = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=options.max_tokens,
            num_return_sequences=options.generations,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id or 0,
        )[:, width:]
        ended = (answer == end).int().cumsum(1)
        return int(((ended - (answer == end).int()) == 0).sum())

    return run


def continuous_rival(model: Any, tokenizer: Any, prompts: list[list[int]], options: argparse.Namespace) -> Rival:
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=options.max_tokens,
        eos_token_id=-1 if options.full_length else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    inputs = [prompt for prompt in prompts for _ in range(options.generations)]

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        answers = model.generate_batch(inputs=inputs, generation_config=config, progress_bar=False)
        return sum(len(answer.generated_tokens) for answer in answers.values())

    return run


def measure(rivals: dict[str, Rival], rounds: int) -> dict[str, list[tuple[float, float, int]]]:
    """Rounds of (wall seconds, CPU seconds, tokens) for each rival that runs at all, after one warm-up each."""
    for name in list(rivals):
        try:
            rivals[name](0)
        except Exception as error:  # whatever a rival fails with is its result
            print(f"{name}: does not run here: {type(error).__name__}: {str(error)[:200]}")
            del rivals[name]
    results: dict[str, list[tuple[float, float, int]]] = {name: [] for name in rivals}
    for seed in range(1, rounds + 1):
        for name, rival in rivals.items():
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = rival(seed)
            results[name].append((time.perf_counter() - wall, time.process_time() - cpu, tokens))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(16, 24))
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--full-length", action="store_true", help="no end token: every completion is max-tokens long")
    parser.add_argument("--continuous", action="store_true", help="also run generate_batch")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    directory = options.model or embedded_model_dir()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    draw = random.Random(0)
    prompts = [
        [draw.randrange(3, model.config.vocab_size) for _ in range(draw.randint(*options.prompt_tokens))]
        for _ in range(options.prompts)
    ]
    rivals = {
        "engine": engine_rival(model, tokenizer, prompts, options, "auto"),
        "engine, impl=module": engine_rival(model, tokenizer, prompts, options, "module"),
        "generate": generate_rival(model, tokenizer, prompts, options),
    }
    if options.continuous:
        rivals["generate_batch"] = continuous_rival(model, tokenizer, prompts, options)
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}; {options.prompts} prompts x "
        f"{options.generations} completions, at most {options.max_tokens} tokens"
    )
    results = measure(rivals, options.rounds)
    base = statistics.median(cpu / tokens for _, cpu, tokens in results["generate"])
    wall_base = statistics.median(wall / tokens for wall, _, tokens in results["generate"])
    for name, rounds in results.items():
        cost = statistics.median(cpu / tokens for _, cpu, tokens in rounds)
        wall_cost = statistics.median(wall / tokens for wall, _, tokens in rounds)
        count, seconds = statistics.median(tokens for *_, tokens in rounds), statistics.median(wall for wall, *_ in rounds)
        print(
            f"{name:20s} {1 / wall_cost:9.0f} tokens/s  {wall_base / wall_cost:5.2f}x wall  {base / cost:5.2f}x CPU  "
            f"({count:.0f} tokens in {seconds:.3f} s)"
        )


if __name__ == "__main__":
    main()
