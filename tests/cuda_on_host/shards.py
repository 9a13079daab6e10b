"""Updates of a sharded policy on the device that is not there, by a group of one rank.

    python -m tests.cuda_on_host.shards LIBRARY CONFIGURATIONS

Configurations are a JSON list of settings. What is printed is JSON too: of each, the metrics of two updates, how the host waits
within a parallel head, where shards and gathered weights lie, and the sum of all squared weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.cuda_on_host.torch_device import Device, load

if TYPE_CHECKING:
    from grpo_fast import Config
    from grpo_fast.train.policy import Policy


def updated(policy: Policy, config: Config) -> list[dict[str, float]]:
    """Metrics of two updates."""
    from grpo_fast.metrics import PhaseTimer
    from grpo_fast.train.optim import build_optimizer
    from grpo_fast.train.step import Learner
    from grpo_fast.types import Completion, Group, Prompt

    def group(index: int) -> Group:
        rewards = [1.0, 0.0, 0.5, 0.25]
        tokens = [tuple(4 + (3 * index + 5 * number + at) % 24 for at in range(3 + number)) for number in range(4)]
        completions = [Completion(ids, (-2.0,) * len(ids), "stop", "") for ids in tokens]
        return Group(Prompt(index, "", (4, 5 + index)), completions, [[value] for value in rewards], rewards)

    learner = Learner(config, policy, build_optimizer(policy.model, config), reference=None)
    groups = [group(0), group(1)]
    return [dict(learner.update(groups, learning_rate=1e-3, timer=PhaseTimer()).metrics) for _ in range(2)]


def squared(model: Any) -> float:
    """Sum of all squared weights of a whole model."""
    return sum(weight.detach().double().square().sum().item() for weight in model.parameters())


def sharded(device: Device, settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    from grpo_fast import Config
    from grpo_fast.rollout.whole_weights import whole_weights
    from grpo_fast.train.distributed import World
    from grpo_fast.train.policy_source import PolicySource
    from grpo_fast.train.sharding import spread

    config = Config.parse(settings)
    source = PolicySource(config)
    policy, _ = spread(source, config=config, world=World(0, 1))
    device.waits.clear()
    metrics = updated(policy, config)
    in_head = "/gathered_token_logprob/"
    waits = sorted({place.partition(in_head)[2] for place in device.waits if in_head in place})
    weights: dict[str, Any] = dict(policy.model.named_parameters())
    with torch.no_grad():
        return {
            "metrics": metrics,
            "waits": waits,
            "shards": sorted({weight.to_local().device.type for weight in weights.values()}),
            "gathered": sorted({whole.device.type for _, whole in whole_weights(policy.model, weights)}),
            "squared": squared(policy.whole_model()),
        }


def main() -> None:
    library, configurations = sys.argv[1:]
    load(Path(library))
    device = Device()

    import torch.distributed as dist

    dist.init_process_group("cpu:gloo,cuda:gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(json.dumps([sharded(device, settings) for settings in json.loads(configurations)]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
