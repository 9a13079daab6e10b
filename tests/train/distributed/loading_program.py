"""What the ranks of a test load of every configuration in a JSON file, each rank's findings to a JSON file of its own."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401 (once, for all ranks that are forked)
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from grpo_fast.config import Config
from grpo_fast.train.distributed import World
from grpo_fast.train.policy import Policy
from grpo_fast.train.policy_source import PolicySource
from grpo_fast.train.sharding import ShardedPolicy, load_sharded
from grpo_fast.train.stored_weights import NotInPartsError, is_hollow

TRY_MEMORY = "memory"
M_MMAP_THRESHOLD = -3  # of malloc.h


def contents(model: torch.nn.Module) -> dict[str, list[Any]]:
    """Type, shape, whether it is trained, and bytes of every weight and buffer, however many names each has."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    found = {}
    for name, tensor in named:
        whole = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        digest = hash(whole.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        found[name] = [str(whole.dtype), list(whole.shape), tensor.requires_grad, digest]
    return found


def in_parts(source: PolicySource) -> bool:
    """Whether each rank reads its part alone."""
    try:
        hollow, _ = source.load_hollow()
    except NotInPartsError:
        return False
    assert all(is_hollow(weight) for name, weight in hollow.model.named_parameters() if ".lora_" not in name)
    return True


def compared(world: World, values: dict[str, Any], directory: Path) -> dict[str, Any]:
    """How a policy that is loaded in parts differs from the same one, read whole and then sharded."""
    config = Config.parse(values)
    source = PolicySource(config)
    whole = ShardedPolicy(source.load(), None, config=config, world=world)
    policy = load_sharded(source, None, config=config, world=world)
    true, found = contents(whole.model), contents(policy.model)
    differing = sorted(name for name in true.keys() | found.keys() if true.get(name) != found.get(name))
    tokens = torch.arange(4, 12)[None]
    with torch.no_grad():
        logits = [one._logits(tokens, torch.arange(8)) for one in (whole, policy)]
        for weight in policy.model.parameters():
            weight.add_(1.0)
    changed = contents(policy.model)
    policy.reading(world).once(lambda: policy.save(directory))
    again = load_sharded(source, None, config=config, world=world)
    again.load_weights(directory)
    trained = [name for name, one in changed.items() if one[2]]
    resumed = contents(again.model)
    made = resumed if config.use_peft else contents(load_sharded(source.at(directory), None, config=config, world=world).model)
    return {
        "in parts": in_parts(source),
        "differing": differing,
        "same logits": torch.equal(*logits),
        "layout": [whole.layout, policy.layout],
        "model config": whole.model.config.to_dict() == policy.model.config.to_dict(),
        "generation config": whole.model.generation_config.to_dict() == policy.model.generation_config.to_dict(),
        "modes": [[module.training for module in one.model.modules()] for one in (whole, policy)],
        "trained": len(trained),
        "not resumed": [name for name in trained if resumed[name] != changed[name]],
        "not made": [name for name in trained if made[name] != changed[name]],
        "told apart": all(changed[name] != true[name] for name in trained),
    }


def peak_bytes(make: Callable[[], Policy]) -> tuple[int, Policy]:
    """Most resident memory over what was there before."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before, policy = resident("VmRSS"), make()
    return resident("VmHWM") - before, policy


def resident(kind: str) -> int:
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return 1024 * int(found.group(1))


def measured(world: World, values: dict[str, Any]) -> dict[str, Any]:
    """Bytes that this rank takes at most while it loads a model in parts, and whole."""
    config = Config.parse(values)
    source = PolicySource(config)
    peak, policy = peak_bytes(lambda: load_sharded(source, None, config=config, world=world))
    ends = [policy.model.get_input_embeddings().weight, *policy.model.base_model.layers[0].parameters()]
    found = {"in parts": peak, "all": 4 * sum(weight.numel() for weight in policy.model.parameters())}
    found["largest unit"] = 4 * max(ends[0].numel(), sum(weight.numel() for weight in ends[1:]))
    del policy
    found["whole"], _ = peak_bytes(lambda: ShardedPolicy(source.load(), None, config=config, world=world))
    return found


def main(cases: Path, output: Path) -> None:
    torch.set_num_threads(1)
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536) == 1  # else glibc keeps what has been freed
    dist.init_process_group("gloo")
    world = World.join(torch.device("cpu"), timeout_s=60)
    wanted = json.loads(cases.read_text(encoding="utf-8"))
    found = {
        name: measured(world, values) if name == TRY_MEMORY else compared(world, values, output / f"saved {name}")
        for name, values in wanted.items()
    }
    (output / f"rank-{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
