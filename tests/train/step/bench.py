"""A learner under observation, and what its gradients ought to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from grpo_fast.config import Config
from grpo_fast.metrics import PhaseTimer
from grpo_fast.train.optim import build_optimizer
from grpo_fast.train.policy import Policy
from grpo_fast.train.results import UpdateResult
from grpo_fast.train.step import Learner
from grpo_fast.types import Group

MakeGroup = Callable[..., Group]
MakePolicy = Callable[..., Policy]


class Bench:
    """A learner whose gradients are written down just before the optimiser uses them."""

    def __init__(self, policy: Policy, reference: Policy | None = None, **settings: Any) -> None:
        self.config = Config.parse({"max_completion_length": 8, "adam_epsilon": 1e-4, "max_grad_norm": 0.0, **settings})
        self.policy = policy
        self.optimizer = build_optimizer(policy.model, self.config)
        self.learner = Learner(self.config, policy, self.optimizer, reference=reference)
        self.gradients: list[torch.Tensor] = []
        self.optimizer.register_step_pre_hook(lambda *_: self.gradients.append(self._flat("grad")))

    def update(self, groups: Sequence[Group], learning_rate: float = 1e-3) -> UpdateResult:
        return self.learner.update(groups, learning_rate=learning_rate, timer=PhaseTimer())

    def weights(self) -> torch.Tensor:
        return self._flat("data")

    def _flat(self, name: str) -> torch.Tensor:
        return torch.cat([getattr(p, name).flatten().clone() for p in self.policy.model.parameters()])


def truth(policy: Policy, groups: Sequence[Group], config: Config) -> tuple[float, torch.Tensor]:
    """Loss and gradient of ``dapo`` against the sampler's log-probabilities, in float64, from full logits, nothing left out."""
    model = policy.model.double()
    total = sum(completion.num_sampled for group in groups for completion in group.completions)
    loss = torch.zeros((), dtype=torch.float64)
    for group in groups:
        rewards = torch.tensor(group.reward, dtype=torch.float64)
        known = rewards[~rewards.isnan()]
        advantages = ((rewards - known.mean()) / (known.std() + 1e-4)).nan_to_num(0.0)
        for completion, advantage in zip(group.completions, advantages, strict=True):
            tokens = torch.tensor([*group.prompt.token_ids, *completion.token_ids])
            logits = model(input_ids=tokens[None], use_cache=False).logits[0] / config.temperature
            first = len(group.prompt.token_ids)
            logprobs = logits.log_softmax(-1)[first - 1 : -1].gather(1, tokens[first:, None])[:, 0]
            ratio = (logprobs - torch.tensor(completion.logprobs, dtype=torch.float64)).exp()
            clipped = ratio.clamp(1 - config.epsilon, 1 + (config.epsilon_high or config.epsilon))
            each = torch.minimum(ratio * advantage, clipped * advantage)
            said = [True] * len(each) if completion.episode is None else completion.episode.sampled
            loss = loss - each[torch.tensor(said)].sum() / total
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    model.float()
    return loss.item(), torch.cat([value.flatten() for value in gradient])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def with_logprobs(group: Group, policy: Policy, *, temperature: float) -> Group:
    """The group as the policy itself would have sampled it."""
    completions = []
    for completion in group.completions:
        tokens = torch.tensor([*group.prompt.token_ids, *completion.token_ids])
        with torch.no_grad():
            logits = policy.model(input_ids=tokens[None], use_cache=False).logits[0] / temperature
        first = len(group.prompt.token_ids)
        logprobs = logits.log_softmax(-1)[first - 1 : -1].gather(1, tokens[first:, None])[:, 0]
        completions.append(replace(completion, logprobs=tuple(logprobs.tolist())))
    return Group(group.prompt, completions, group.rewards, group.reward)
