"""What the ranks of a test run: every case of a JSON file, each rank's findings to a JSON file of its own.

The test calls :func:`play` too, for what one process makes of the same case.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft  # noqa: F401 (once, for all ranks that are forked)
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo_fast.config import Config
from grpo_fast.metrics import PhaseTimer
from grpo_fast.ops import (
    LMHead,
    LossBatch,
    LossSpec,
    gathered_token_logprob,
    parallel_token_logprob,
    policy_loss,
    token_logprob,
)
from grpo_fast.ops.fused_grpo import fused_grpo_reference
from grpo_fast.rollout import WeightSyncError
from grpo_fast.rollout.sync_probe import SyncProbe
from grpo_fast.rollout.weight_sync import WeightSync
from grpo_fast.rollout.whole_weights import whole_weights
from grpo_fast.tasks.task import Task
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.adamw import OffloadedAdamW, StochasticAdamW
from grpo_fast.train.distributed import World
from grpo_fast.train.optim import build_optimizer
from grpo_fast.train.policy_source import PolicySource
from grpo_fast.train.sharding import ShardedPolicy
from grpo_fast.train.step import Learner
from grpo_fast.types import Completion, Group, Prompt
from tests.train.trainer.runs import LETTERS, vowels


def failing(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    if os.environ.get("RANK") == "1":
        raise KeyError("no such answer")
    return [1.0] * len(completions)


def unrewarded(completions: list[str], **columns: Any) -> list[None]:
    return [None] * len(completions)


REWARDS = {"failing": failing, "unrewarded": unrewarded}
"""Of runs by their names; of all others it is :func:`vowels`."""


def play(
    values: dict[str, Any],
    reward: Any = vowels,
    *,
    task: Task = LETTERS,
    resume: bool = False,
    until: int | None = None,
) -> dict[str, Any]:
    """Trains, as far as a step, and tells what came of it: weights, why it ended, and the error where one did."""
    found: dict[str, Any] = {"error": None, "steps": []}
    try:
        with GRPOTrainer(Config.parse(values), task=task, reward_funcs=[reward], resume=resume) as trainer:
            found["is_main_process"] = trainer.is_main_process
            found["at first"] = digest(trainer)
            for step in trainer.steps():
                found["steps"].append([step.step, step.metrics["reward"], step.metrics["loss"]])
                if step.step == until:
                    break
            found["stopped_by"] = trainer.summary["stopped_by"]
            whole = trainer.policy.whole_model()
            found["weights"] = torch.cat([p.detach().flatten() for p in whole.parameters()]).tolist()
            found["at last"] = digest(trainer)
            found["numbers held"] = sum(local(p).numel() for p in trainer.policy.model.parameters())
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def digest(trainer: GRPOTrainer) -> dict[str, str]:
    """What identifies, bit for bit, weights that are trained and the optimiser's state, whoever holds which part of them."""
    digests = {}
    for name, weight in trainer.policy.model.named_parameters():
        state = {"weight": weight} | trainer._optimizer.state.get(weight, {})
        for key, value in state.items() if weight.requires_grad else ():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if key == "step":  # a number or a tensor of one
                digests[f"{name} {key}"] = f"number {float(whole)}"
                continue
            content = whole.detach().contiguous().view(torch.uint8).numpy().tobytes()
            digests[f"{name} {key}"] = f"{whole.dtype} {hashlib.sha256(content).hexdigest()}"
    return digests


def local(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def exchanges(world: World) -> dict[str, Any]:
    """What the ranks make of each exchange."""
    found: dict[str, Any] = {"shares": [[s.start, s.stop] for s in (world.share(n) for n in (0, 1, 7))]}
    found["gathered"] = world.gather(lambda: f"rank {world.rank}")
    found["once"] = world.once(os.getpid) == os.getpid()
    tensors = [torch.full((3, 2), 1.0 + world.rank), torch.ones(2, dtype=torch.float64), torch.arange(4.0).view(2, 2).t()]
    tensors.append(torch.tensor([1.0 if world.rank else 256.0], dtype=torch.bfloat16))  # 256 + 1 is 256 there
    world.sum(tensors)
    found["summed"] = [tensor.tolist() for tensor in tensors]

    def stumble() -> None:
        if world.rank:
            raise StubbornError(world.rank, why="it must")

    for name, exchange in (("gather", world.gather), ("once", world.once)):
        try:
            exchange(stumble)
        except StubbornError as error:
            found[f"{name} raised"] = [str(error), error.why]
    found["beside"] = beside(world)
    return found


def beside(world: World) -> bool:
    """Whether a thread and the main one hear what is theirs, whichever of them comes first on a rank."""
    enter = world.beside()

    def exchange(who: str) -> list[Any]:
        found: list[Any] = []
        for number in range(30):
            time.sleep(0.002 * ((number + world.rank + len(who)) % 3))
            found.append(world.gather(lambda told=(who, number): told))  # type: ignore[misc]
            found.append(world.once(lambda told=(who, number): told))  # type: ignore[misc]
        return [*found, world.patiently(lambda: who)]

    def aside() -> list[Any]:
        with enter():
            return exchange("aside")

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(aside)
        heard = {"main": exchange("main"), "aside": running.result()}
    return all(
        told == [part for number in range(30) for part in ([(who, number)] * world.size, (who, number))] + [who]
        for who, told in heard.items()
    )


def parallel_head(world: World) -> list[float]:
    """How far loss and gradients over a head in parts are from those over the whole one, in float64."""
    generator = torch.Generator().manual_seed(9)
    shapes = ((40, 6), (23, 6), (23,))
    true = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    first, last = (23 * (world.rank + side) // world.size for side in (0, 1))
    mine = [part.detach().clone().requires_grad_() for part in (true[0], true[1][first:last], true[2][first:last])]
    # of two ranks, 16 rows fit where 11 tokens are and 8 where 12 are
    options = {"temperature": 0.8, "softcap": 4.0, "chunk_bytes": 16 * 11 * 8 if world.size == 2 else 8 * 6 * 8}
    targets = torch.randint(23, (40,), generator=generator)
    sequences = torch.arange(40) // 10
    old = token_logprob(true[0].detach(), LMHead(true[1].detach(), true[2].detach(), **options), targets=targets)[0]
    old = old + 0.3 * torch.randn(40, generator=generator, dtype=torch.float64)
    weights = torch.full((4,), 0.025, dtype=torch.float64)
    batch = LossBatch(
        sequences, torch.linspace(-1, 1, 4, dtype=torch.float64), weights, old_logprobs=old, num_items_in_batch=40.0
    )
    spec = LossSpec(entropy_coef=0.1)
    expected = fused_grpo_reference(true[0], LMHead(*true[1:], **options), targets=targets, batch=batch, spec=spec).loss
    logprobs, entropy = parallel_token_logprob(mine[0], LMHead(*mine[1:], **options), targets=targets, first_token=first)
    loss = policy_loss(logprobs, batch, spec=spec, entropy=entropy).loss
    expected.backward()
    loss.backward()
    gradients = [true[0].grad, true[1].grad[first:last], true[2].grad[first:last]]
    errors = [(one.grad - other).abs().max().item() for one, other in zip(mine, gradients, strict=True)]
    return [abs(loss.item() - expected.item()), *errors, min(gradient.abs().max().item() for gradient in gradients)]


def optimizers(mesh: DeviceMesh) -> dict[str, float]:
    """How far updates of shards, and the state they leave, are from those of the whole weights."""
    generator = torch.Generator().manual_seed(5)
    values = [torch.randn(shape, generator=generator) for shape in ((1101, 2048), (7, 3), (5,))]
    gradients = [[torch.randn(value.shape, generator=generator) for value in values] for _ in range(2)]
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}
    kinds: dict[str, tuple[Any, torch.dtype]] = {
        "stochastic": (lambda weights: StochasticAdamW(weights, **settings, seed=3), torch.bfloat16),
        "offloaded": (lambda weights: OffloadedAdamW(weights, **settings), torch.float32),
    }
    found = {}
    for name, (make, dtype) in kinds.items():
        whole = [torch.nn.Parameter(value.to(dtype)) for value in values]
        parts = [torch.nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)])) for weight in whole]
        one, other = make(whole), make(parts)
        for step in gradients:
            for weight, part, gradient in zip(whole, parts, step, strict=True):
                weight.grad = gradient.to(dtype)
                part.grad = distribute_tensor(weight.grad, mesh, [Shard(0)])
            one.step()
            other.step()
        pairs = list(zip(whole, parts, strict=True))
        for weight, part in pairs[:]:
            state, theirs = one.state[weight], other.state[part]
            pairs += [(state[key], theirs[key]) for key in state if key != "step"]
        found[name] = max((true - part.full_tensor()).abs().max().item() for true, part in pairs)
        found[f"{name} tensors"] = len(pairs)
    return found


def gathered_rows(world: World) -> list[float]:
    """The same of rows that are spread too, of which each rank has another number; in float64."""
    generator = torch.Generator().manual_seed(10)
    rows, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((21, 6), (23, 6)))
    targets = torch.randint(23, (21,), generator=generator)
    weights = torch.randn(2, 21, generator=generator, dtype=torch.float64)
    whole = [rows.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = token_logprob(whole[0], LMHead(whole[1]), targets=targets)
    (expected[0] @ weights[0] + expected[1] @ weights[1]).backward()
    start, stop = (21 * side**2 // world.size**2 for side in (world.rank, world.rank + 1))
    first, last = (-(-23 // world.size) * side for side in (world.rank, world.rank + 1))
    own = [rows[start:stop].clone().requires_grad_(), weight[first:last].clone().requires_grad_()]
    found = gathered_token_logprob(own[0], LMHead(own[1]), targets=targets[start:stop], first_token=first)
    (found[0] @ weights[0, start:stop] + found[1] @ weights[1, start:stop]).backward()
    pairs = [(found[0], expected[0][start:stop]), (found[1], expected[1][start:stop])]
    pairs += [(own[0].grad, whole[0].grad[start:stop]), (own[1].grad, whole[1].grad[first:last])]
    return [(one - other).abs().max().item() for one, other in pairs]


class Traffic(TorchDispatchMode):
    """Counts exchanges by kind and by the size of their largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # it comes back as what a DTensor does inside
        result = func(*args, **(kwargs or {}))
        kind = next((kind for kind in ("allgather", "reducescatter") if kind in str(func).replace("_", "")), None)
        if kind is not None:
            tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
            self.seen[kind, max(tensor.numel() for tensor in tensors)] += 1
        return result


def head_traffic(world: World, values: dict[str, Any]) -> dict[str, Any]:
    """How often an update of two iterations gathers the head and scatters its gradient, whole or in parts."""
    found = {}
    kept = {name: value for name, value in values.items() if "ref_model" not in name}
    changes = {"fsdp": "full_shard", "num_iterations": 2, "beta": 0.0}
    for parallel in (False, True):
        config = Config.parse(kept | changes | {"fsdp_parallel_head": parallel})
        policy = ShardedPolicy(PolicySource(config).load(), None, config=config, world=world)
        learner = Learner(config, policy, build_optimizer(policy.model, config), reference=None, world=world)
        completions = [Completion((4 + n, 5, 6 + n, 7), (-1.0,) * 4, "stop", "") for n in range(8)]
        groups = [Group(Prompt(n, "", (4, 5 + n)), completions, [], [float(i) for i in range(8)]) for n in range(3)]
        with Traffic() as traffic:
            learner.update(groups, learning_rate=1e-3, timer=PhaseTimer())
        head = policy.model.get_output_embeddings().weight.numel()
        found[str(parallel)] = [traffic.seen[kind, head] for kind in ("allgather", "reducescatter")]
        found[f"{parallel} others"] = sum(traffic.seen.values())
    return found


class Wire:
    """What a weight sync asks of an engine; its sending reads all weights, and breaks off or hangs where it is told to."""

    def __init__(self, model: Any, names: list[str]) -> None:
        self.model, self.names = model, names
        self.fates: list[str] = []
        self.freed, self.done = threading.Event(), threading.Event()
        self.refusal = ""
        self.arrived: dict[str, torch.Tensor] = {}

    def send(self) -> int:
        fate = self.fates.pop(0) if self.fates else ""
        self.arrived = {}
        weights = whole_weights(self.model, self.names, torch.bfloat16)
        for name, weight in weights:
            self.arrived[name] = weight.clone()
            del weight  # as a sender does, before the next is gathered
            if len(self.arrived) == 5 and fate == "breaks":
                raise ConnectionError("the wire broke")
            if len(self.arrived) == 5 and fate == "hangs":
                self.freed.wait(20)
                try:
                    list(weights)
                except RuntimeError as error:
                    self.refusal = str(error)
                self.done.set()
        return 1

    def finish(self, version: int) -> None:
        self.version = version

    def weight_version(self) -> int:
        return self.version

    def answer(self, prompts: Any) -> list[list[dict[int, float]]]:
        return [self.choices]

    def reset_prefix_cache(self) -> bool:
        return True

    def pause(self) -> None: ...

    resume = undo = pause

    def wake(self, part: str) -> None: ...

    def waits_for(self) -> str:
        return ""


class Gathered:
    """Bytes of whole weights that live, where shards are gathered inside."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def __enter__(self) -> Gathered:
        self._gather = DTensor.full_tensor

        def counted(shard: DTensor) -> torch.Tensor:
            whole = self._gather(shard)
            self.now += whole.nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(whole, self._free, whole.nbytes)
            return whole

        DTensor.full_tensor = counted  # type: ignore[method-assign]
        return self

    def _free(self, size: int) -> None:
        self.now -= size

    def __exit__(self, *_: object) -> None:
        DTensor.full_tensor = self._gather  # type: ignore[method-assign]


def streamed(world: World, values: dict[str, Any], directory: Path) -> dict[str, Any]:
    """What rank 0 reads of a sharded policy that has no mirror, through syncs that succeed, break off and hang."""
    config = Config.parse(values | {"fsdp": "full_shard", "fsdp_parallel_head": True})
    whole = PolicySource(config).load()
    policy = ShardedPolicy(PolicySource(config).load(), None, config=config, world=world, streams=True)
    true = {name: weight.detach() for name, weight in whole.model.named_parameters()}
    units: Counter[str] = Counter()
    for name, weight in true.items():
        units[re.sub(r"(layers\.\d+)\..*", r"\1", name)] += 2 * weight.numel()
    wire, probe = Wire(policy.whole_model(), list(true)), SyncProbe(tuple(range(4, 12)), 1e-9)
    wire.choices = [dict(enumerate(row.tolist())) for row in probe.score(whole.model).logprobs]

    def attempt(*fates: str, deadline_s: float = 30.0) -> str:
        wire.fates = list(fates)
        sync = WeightSync(wire, probe, deadline_s=deadline_s)
        try:
            return str(policy.reading(world).once(lambda: sync.run(wire.model, 1)["sync/version"]))
        except WeightSyncError as error:
            return str(error)

    found: dict[str, Any] = {"largest unit": max(units.values())}
    with Gathered() as gathered:
        found["synced"] = attempt()
    found["most"], found["left"] = gathered.most, gathered.now
    found["arrived"] = [name for name, weight in wire.arrived.items() if torch.equal(weight, on_the_way(true[name]))]
    found["names"] = list(true)
    found["again"], found["broken"] = attempt("breaks"), attempt("breaks", "breaks")
    if not config.use_peft:
        found["hung"] = attempt("hangs", deadline_s=2.0)
        wire.freed.set()
        found["refusal"] = world.once(lambda: wire.done.wait(20) and wire.refusal)
    found["after"] = attempt()
    policy.reading(world).once(lambda: policy.save(directory))
    file = directory / ("adapter_model.safetensors" if config.use_peft else "model.safetensors")
    found["saved"] = world.once(lambda: saved_like(load_file(file), true))
    return found


def on_the_way(weight: torch.Tensor) -> torch.Tensor:
    """A weight as it is gathered: in bfloat16, or in the bytes that stand for four bits."""
    return weight.bfloat16() if weight.is_floating_point() else weight.data


def saved_like(saved: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> bool:
    """Whether a file holds adapters under peft's names, or else all weights, bit for bit."""
    adapters = {f"base_model.model.{n.replace('.default', '')}": w for n, w in true.items() if ".lora_" in n}
    wanted = adapters or true
    return saved.keys() == wanted.keys() and all(torch.equal(saved[name], weight) for name, weight in wanted.items())


class StubbornError(Exception):
    """An error whose arguments are not what it keeps."""

    def __init__(self, rank: int, *, why: str) -> None:
        super().__init__(f"rank {rank} stumbled")
        self.why = why


def main(cases: Path, output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = World.join(torch.device("cpu"), timeout_s=60)
    found: dict[str, Any] = {"exchanges": exchanges(world), "head": parallel_head(world)}
    found["gathered rows"] = gathered_rows(world)
    found["optimizers"] = optimizers(init_device_mesh("cpu", (world.size,)))
    wanted = json.loads(cases.read_text(encoding="utf-8"))
    found["traffic"] = head_traffic(world, next(iter(wanted.values())))
    found["streamed"] = {
        name: streamed(world, wanted[name], output / f"streamed {name}") for name in ("whole", "adapters", "quantised")
    }
    for name, values in wanted.items():
        if values["fsdp"] == "hybrid_shard":
            os.environ["LOCAL_WORLD_SIZE"] = "2"  # as if on nodes of two
        half = name.partition(" ")[0]
        found[name] = play(
            values, REWARDS.get(name, vowels), resume=half == "resumed", until={"begun": 2, "resumed": 4}.get(half)
        )
    (output / f"rank-{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
