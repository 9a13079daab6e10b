"""Memory of an update under FSDP: the head gathered, or left in parts of the vocabulary.

Every rank of a gloo group on this machine holds a model of one narrow layer under a large head, and trains on completions of
random tokens. Peak memory is what the update adds to what a rank has resident before it. Run
``python -m benchmarks.system.head_memory --output benchmarks/results/cpu/head_memory.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grpo_fast.config import Config
from grpo_fast.device import device_facts
from grpo_fast.metrics import PhaseTimer
from grpo_fast.train.distributed import World
from grpo_fast.train.optim import build_optimizer
from grpo_fast.train.policy import Policy
from grpo_fast.train.sharding import ShardedPolicy
from grpo_fast.train.step import Learner
from grpo_fast.types import Completion, Group, Prompt

PROMPT_TOKENS = 8


def measure(*, num_ranks: int, vocabulary: int, hidden: int, tokens: int) -> dict[str, Any]:
    """Peak memory and seconds of the second update, the largest of all ranks.

    Args:
        num_ranks: processes.
        vocabulary: V.
        hidden: H.
        tokens: of one micro-batch of a rank, about; each rank has two of them.
    """
    found: dict[str, Any] = {"num_ranks": num_ranks, "vocabulary": vocabulary, "hidden": hidden, "tokens": tokens}
    model_config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    for name, parallel in (("gathered", False), ("in_parts", True)):
        config = Config(
            max_completion_length=tokens,
            tokens_per_microbatch=tokens,
            fsdp="full_shard",
            fsdp_parallel_head=parallel,
            device="cpu",
        )
        with tempfile.TemporaryDirectory() as directory, ProcessPoolExecutor(num_ranks, get_context("spawn")) as pool:
            update = partial(_rank, num_ranks=num_ranks, store=f"{directory}/store", model_config=model_config, config=config)
            told = list(pool.map(update, range(num_ranks)))
        found[name] = {key: max(one[key] for one in told) for key in told[0]}
    return found


def _rank(rank: int, *, num_ranks: int, store: str, model_config: LlamaConfig, config: Config) -> dict[str, float]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    world = World.join(torch.device("cpu"), timeout_s=300)
    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config)
    policy = ShardedPolicy(Policy(model, PreTrainedTokenizerFast), None, config=config, world=world)  # type: ignore[arg-type]
    learner = Learner(config, policy, build_optimizer(policy.model, config), reference=None, world=world)
    groups = _groups(2 * num_ranks, model_config.vocab_size, config.max_completion_length // 4 - PROMPT_TOKENS)
    found: dict[str, float] = {}
    for _ in range(2):  # the first makes the moments
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is that of what follows
        before, begun = _resident_mib("VmRSS"), time.perf_counter()
        learner.update(groups, learning_rate=1e-6, timer=PhaseTimer())
        found = {"peak_mib": _resident_mib("VmHWM") - before, "update_s": time.perf_counter() - begun}
    dist.destroy_process_group()
    return found


def _groups(count: int, vocabulary: int, length: int) -> list[Group]:
    """Groups of four completions of random tokens."""
    generator = torch.Generator().manual_seed(1)
    groups = []
    for number in range(count):
        drawn = torch.randint(vocabulary, (4, length), generator=generator).tolist()
        completions = [Completion(tuple(ids), (-1.0,) * length, "length", "") for ids in drawn]
        groups.append(Group(Prompt(number, "", (1,) * PROMPT_TOKENS), completions, [], [0.0, 1.0, 0.5, 0.25]))
    return groups


def _resident_mib(name: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{name}:")[2].split()[0]) / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    result = measure(num_ranks=options.ranks, vocabulary=options.vocabulary, hidden=options.hidden, tokens=options.tokens) | {
        "device": device_facts("cpu").as_dict()
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
