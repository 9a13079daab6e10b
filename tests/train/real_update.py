"""A real update of a model that is built in the test, and what it holds at its fullest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.autograd.profiler import profile
from transformers import AutoModelForCausalLM

from grpo_fast.config import Config
from grpo_fast.metrics import PhaseTimer
from grpo_fast.ops.products import use_products
from grpo_fast.train.adapters import Adapters
from grpo_fast.train.checkpointing import checkpoint_layers
from grpo_fast.train.optim import build_optimizer
from grpo_fast.train.policy import Policy
from grpo_fast.train.policy_source import attention_arguments
from grpo_fast.train.step import Learner
from grpo_fast.types import Completion, Group, Prompt


def most_held(work: Callable[[], object]) -> int:
    """Bytes that PyTorch's allocator gave out at most at once, beyond those that were out before."""
    with profile(profile_memory=True) as profiled:  # torch.profiler's makes a tree of all operators too, which takes longer
        work()
    results: Any = profiled.kineto_results
    found = [event for event in results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(found, key=lambda event: event.start_ns())))


def groups_of(config: Config, *, prompt_tokens: int, completion_tokens: Sequence[int], vocab: int) -> list[Group]:
    """Groups of a step whose completions are so long, every second one rewarded; tokens are of no meaning."""
    groups = []
    for first in range(0, len(completion_tokens), config.num_generations):
        lengths = completion_tokens[first : first + config.num_generations]
        prompt = Prompt(first, "", tuple((first + place) % vocab for place in range(prompt_tokens)))
        made = [Completion(tuple(range(3, 3 + n)), (-1.0,) * n, "stop", "") for n in lengths]
        groups.append(Group(prompt, made, reward=[float(number % 2) for number in range(len(lengths))]))
    return groups


def policy_of(model_config: Any, config: Config) -> Policy:
    """The model with random weights, made ready as a run does."""
    short = config.dtype == "bfloat16"
    kept_short = short and (config.use_peft or config.weights_dtype == "bfloat16")
    dtype = torch.bfloat16 if kept_short else torch.float32
    model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, **attention_arguments(config, model_config))
    use_products(model)
    adapters = Adapters(model, config) if config.use_peft else None
    checkpointing = config.gradient_checkpointing_mode if config.gradient_checkpointing else None
    if checkpointing is not None:
        checkpoint_layers(model, checkpointing)
    return Policy(
        model,
        None,  # type: ignore[arg-type]
        autocast_dtype=torch.bfloat16 if short else None,
        checkpointing=checkpointing,
        adapters=adapters,
        padding_free=config.padding_free,
    )


def update_peak(model_config: Any, config: Config, *, prompt_tokens: int, completion_tokens: Sequence[int]) -> int:
    """What an update holds at most beside what lasts: moments are made in another one before it."""
    policy = policy_of(model_config, config)
    learner = Learner(config, policy, build_optimizer(policy.model, config), reference=None)
    groups = groups_of(config, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, vocab=model_config.vocab_size)
    learner.update(groups[:1], learning_rate=1e-5, timer=PhaseTimer())
    return most_held(lambda: learner.update(groups, learning_rate=1e-5, timer=PhaseTimer()))
