"""What ``torch_compile`` gains: forward and backward passes of the same micro-batches, compiled and not, in turns.

Packed sequences with shared prompts, 4 answers to each; the loss is the sum of squares of the hidden states, as the head is not
compiled. Times are the process's own processor time, on one thread, so that other work on the machine counts little. Run
``python -m benchmarks.system.compile_time [--model DIRECTORY] --output FILE``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from grpo_fast.config import Config
from grpo_fast.device import device_facts
from grpo_fast.train.batch import TrainingSequence, build_batch
from grpo_fast.train.policy import Policy
from grpo_fast.train.policy_source import PolicySource
from grpo_fast.types import TokenBatch

NUM_BATCHES = 4


def measure(model: str, *, num_sequences: int, prompt: int, completion: int, rounds: int) -> dict[str, Any]:
    """Median seconds of a pass each way, and of the first compiled one.

    Args:
        model: ``embedded`` or a directory.
        num_sequences: of a micro-batch.
        prompt: tokens of the shortest prompt; each is one longer than the one before.
        completion: tokens of the longest completion; the shortest has half of them.
        rounds: passes over the micro-batches.
    """
    torch.set_num_threads(1)
    config = Config(model=model, device="cpu", max_completion_length=completion)
    plain, compiled = (PolicySource(config.replace(torch_compile=on)).load() for on in (False, True))
    batches = _batches(plain, num_sequences, prompt, completion)
    first = _seconds(compiled, batches[0])
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds + 1):
        for batch in batches:
            for is_compiled, policy in ((False, plain), (True, compiled)):
                seconds = _seconds(policy, batch)
                if number:  # the first round may compile for other lengths
                    times[is_compiled].append(seconds)
    return {
        "model": Path(model).name,
        "machine": device_facts("cpu").name,
        "torch": torch.__version__,
        "tokens": [batch.input_ids.numel() for batch in batches],
        "num_passes": len(times[True]),
        "first_compiled_cpu_s": first,
        "uncompiled_cpu_s": statistics.median(times[False]),
        "compiled_cpu_s": statistics.median(times[True]),
        "paired_ratio_median": statistics.median(c / u for c, u in zip(times[True], times[False], strict=True)),
    }


def _seconds(policy: Policy, batch: TokenBatch) -> float:
    begun = time.process_time()
    policy.scored_hidden_states(batch).square().sum().backward()
    return time.process_time() - begun


def _batches(policy: Policy, num_sequences: int, prompt: int, completion: int) -> list[TokenBatch]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = policy.model.config.get_text_config().vocab_size

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (number,), generator=generator).tolist())

    batches = []
    for _ in range(NUM_BATCHES):
        sequences = []
        for group in range(num_sequences // 4):
            shared = tokens(prompt + group)
            lengths = torch.randint(completion // 2, completion + 1, (4,), generator=generator).tolist()
            sequences += [TrainingSequence(shared, tokens(n), (-1.0,) * n, 1.0, in_loss=True) for n in lengths]
        weights = [1.0] * len(sequences)
        batches.append(build_batch(sequences, weights, policy.device, layout="packed", shares_prompts=True))
    return batches


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a directory, measured beside the embedded model")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = [measure("embedded", num_sequences=64, prompt=12, completion=30, rounds=20)]
    if options.model is not None:
        results.append(measure(options.model, num_sequences=8, prompt=40, completion=64, rounds=3))
    text = json.dumps(results, indent=1)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")
