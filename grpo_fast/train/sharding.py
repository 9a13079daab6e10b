"""FSDP2: a policy whose weights, gradients and moments are spread over the ranks.

Decoder layers are gathered one at a time, as the forward and backward passes reach them (``fully_shard``). The head is read by
the loss as a plain matrix: it is gathered once an iteration, its gradient summed over the micro-batches and reduce-scattered
once. With ``fsdp_parallel_head`` it stays in parts, each of them a part of the vocabulary, and hidden rows are gathered in its
place. Where the head is also the embedding, both gradients meet in the shard.

Gradients are sums over the ranks, not means: every normaliser is of the whole step already.

A model is not loaded whole to be sharded: each unit is made, cut, and let go of, and each rank reads its own rows of the files
(:mod:`~grpo_fast.train.stored_weights`). What cannot be read so is loaded whole by every rank first.

Engines and saved models need whole weights. Servers and files get them from the shards, a layer at a time
(:mod:`~grpo_fast.train.streaming`). For engines in the ranks' own processes a mirror is kept on the ranks that sample, in the
type that it computes in: after each update those weights of it that are trained are renewed, a tensor at a time.

A frozen base is sharded as trained weights are, and neither has gradients nor is it sent again; of one in four bits the scales
stay whole, and it goes to servers in its bytes until it is read. Adapters are sharded with the layer that they belong to.

Not covered: the optimisers of bitsandbytes, tensor parallelism but for the head.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from grpo_fast.config import Config
from grpo_fast.ops import LMHead
from grpo_fast.rollout.whole_weights import gather, whole_weights
from grpo_fast.train.adapter_start import reader
from grpo_fast.train.bars import bars_for_a_terminal
from grpo_fast.train.distributed import World
from grpo_fast.train.handshake import check_weights
from grpo_fast.train.head_part import Head, HeadPart, first_token_of
from grpo_fast.train.layers import layers_of
from grpo_fast.train.optim import load_state
from grpo_fast.train.policy import Policy
from grpo_fast.train.policy_source import PolicySource
from grpo_fast.train.quantised import give_shards_scales, make_shardable
from grpo_fast.train.shard_files import load_shards, save_shards
from grpo_fast.train.stored_weights import NotInPartsError, StoredWeights, give_memory
from grpo_fast.train.streaming import Once, StreamedModel

_log = logging.getLogger(__name__)


def shards_of_one(config: Config) -> str:
    """The warning for sharding with one process; torch's own FSDP warns and continues without shards too."""
    return (
        f"fsdp={config.fsdp!r} shards nothing, because this run has one process; start one process per device with "
        f"`torchrun --nproc-per-node DEVICES --no-python grpo-fast train --fsdp {config.fsdp} ...`"
    )


class ShardedPolicy(Policy):
    """Takes over a policy, and spreads it.

    Args:
        policy: whole, or without its weights, the same on every rank; not to be used afterwards.
        mirror: another one with the same weights, to be kept whole; ``None`` where this rank needs none.
        config: how to shard.
        world: over whom.
        streams: whether engines read whole weights from the shards; no rank has a mirror then.
        stored: the weights of a policy without them.
    """

    def __init__(
        self,
        policy: Policy,
        mirror: Policy | None,
        *,
        config: Config,
        world: World,
        streams: bool = False,
        stored: StoredWeights | None = None,
    ) -> None:
        vars(self).update(vars(policy))  # a whole one's checks are done, and would run the model
        self._mirror = mirror
        self._device = policy.device
        self._mesh = _mesh(config, world, policy.device)
        if config.load_in_4bit:
            make_shardable(self.model)
        self._units = self._shard(config)
        if stored is not None:
            stored.fill(self.model)
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self._shards = cast("dict[str, DTensor]", trained)
        head = self.model.get_output_embeddings()
        self._head = replace(self._head, weight=head.weight, bias=getattr(head, "bias", None))
        self._head_part = self._place_head() if config.fsdp_parallel_head else None
        if config.load_in_4bit and streams:
            give_shards_scales(self.model)
        units = cast("list[torch.nn.Module]", self._units)
        self._streams = streams
        self._streamed = StreamedModel(self.model, units=units, logits=self._logits, world=world)

    @property
    def device(self) -> torch.device:
        """Device of the forward pass."""
        return self._device

    @property
    def sums_gradients(self) -> bool:
        """Gradients are those of all ranks together."""
        return True

    def _shard(self, config: Config) -> list[FSDPModule]:
        model, bf16 = self.model, self.autocast_dtype is not None
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        offload = CPUOffloadPolicy() if config.fsdp_offload_params else OffloadPolicy()
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        units: list[Any] = [*layers_of(model), model.base_model, *([] if tied else [model.get_output_embeddings()])]
        for module in units:
            give_memory(module.parameters())  # what an inner unit has is in parts by now
            fully_shard(
                module,
                mesh=self._mesh,
                reshard_after_forward=config.fsdp != "shard_grad_op",
                mp_policy=precision,
                offload_policy=offload,
            )
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other, and a factor of 1 needs none
        if tied:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        return units

    @contextlib.contextmanager
    def whole_head(self, *, trains: bool) -> Iterator[None]:
        """The head is whole in here, or this rank's part of it a plain matrix; within another such context it is already.

        Args:
            trains: whether its gradient is to be summed over the ranks afterwards; the same on all.
        """
        sharded = self._head
        shards = [part for part in (sharded.weight, sharded.bias) if isinstance(part, DTensor)]
        if not shards:
            yield
            return
        trains = trains and sharded.weight.requires_grad
        plain = [self._plain(cast(DTensor, shard.detach()), trains=trains).requires_grad_(trains) for shard in shards]
        self._head = replace(sharded, weight=plain[0], bias=plain[1] if len(plain) > 1 else None)
        try:
            yield
        finally:
            self._head = sharded
        if trains:
            self.reshard()
            for shard, matrix in zip(shards, plain, strict=True):
                self._add_gradient(shard, torch.zeros_like(matrix) if matrix.grad is None else matrix.grad)

    def head(self, temperature: float) -> Head:
        """The head, or this rank's part of it, at a sampling temperature."""
        head = replace(self._head, temperature=temperature)
        return head if self._head_part is None else replace(self._head_part, part=head)

    def _place_head(self) -> HeadPart:
        group = self._mesh.get_group("shard")
        first = first_token_of(self._head.weight.shape[0], num_ranks=group.size(), rank=self._mesh.get_local_rank("shard"))
        return HeadPart(self._head, first, group)

    def _plain(self, shard: DTensor, *, trains: bool) -> torch.Tensor:
        if self._head_part is not None:
            return shard.to_local().to(self._device)
        # products round the weight to this type anyway; a bias is added as it is, and gradients are summed in float32
        return gather(shard, None if trains or shard.ndim == 1 else self.autocast_dtype)

    def _add_gradient(self, shard: DTensor, gradient: torch.Tensor) -> None:
        parts: list[Any] = [Partial()] * self._mesh.ndim
        if self._head_part is not None:
            parts[-1] = Shard(0)  # each has the gradient of its own part, of all rows of its shard group
        own = DTensor.from_local(gradient.float(), self._mesh, parts, run_check=False, shape=shard.shape, stride=shard.stride())
        part = own.redistribute(placements=shard.placements).to(shard.device, shard.dtype)
        shard.grad = part if shard.grad is None else shard.grad + part

    def whole_model(self) -> torch.nn.Module:
        """The mirror, renewed; every rank has to ask for it, and one without a mirror gets the sharded model.

        Where weights are streamed, it is the model that they are read from, inside :meth:`reading`.
        """
        if self._streams:
            return self._streamed
        short = None if self.adapters is not None else self.autocast_dtype  # the mirror's; adapters are float32 in it
        with torch.no_grad():
            mirrored = {} if self._mirror is None else dict(self._mirror.model.named_parameters())
            for name, shard in self._shards.items():
                whole = gather(shard, short)
                if mirrored:
                    mirrored[name].copy_(whole)
        return self.model if self._mirror is None else self._mirror.model

    def reading(self, world: World) -> Once:
        """The means by which rank 0 reads whole weights; see :meth:`Policy.reading`."""
        return self._streamed

    def _logits(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.reshard()
        head, dtype = self._head, self.autocast_dtype
        with self.autocast():
            hidden = self._hidden_states(input_ids=input_ids.to(self._device))[:, positions.to(self._device)]
            self.reshard()
            weight, bias = (None if part is None else gather(part, dtype) for part in (head.weight, head.bias))
            logits = torch.nn.functional.linear(hidden, cast(torch.Tensor, weight), bias) * head.logit_scale
        return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)

    def save(self, directory: Path) -> None:
        """Writes what rank 0 gathers in host memory; see :meth:`Policy.save`."""
        held = {name: value for name, value in self.model.state_dict().items() if not isinstance(value, DTensor)}
        wanted = [name for name, _ in self._streamed.named_parameters() if self.adapters is None or ".lora_" in name]
        held |= {name: weight.cpu() for name, weight in whole_weights(self._streamed, wanted)}
        self._write(directory, held)

    def load_weights(self, directory: Path) -> None:
        """Takes over saved weights, each rank its own part of them."""
        self.reshard()
        if self.adapters is not None:
            self.adapters.load(directory, part=_shard_like)
            return
        try:
            StoredWeights(self.model, reader(str(directory), None, local_files_only=True)).fill(self.model)
        except NotInPartsError as error:
            _log.info("every rank reads all of %s, because %s", directory, error)
            with bars_for_a_terminal():
                saved = type(self.model).from_pretrained(directory, dtype=torch.float32)
            own = cast("dict[str, DTensor]", dict(self.model.named_parameters()))
            with torch.no_grad():
                for name, value in saved.named_parameters():
                    own[name].copy_(_shard_like(own[name], value))

    def try_out(self) -> None:
        """Finds out what a whole policy has found out already; every rank has to ask for it."""
        super().try_out()
        self.reshard()

    def _model_logits(self, **inputs: torch.Tensor) -> torch.Tensor:
        cast("FSDPModule", self.model.base_model).unshard()  # OPT's own pass goes by parts of it, around its hooks
        layer = self.model.get_output_embeddings()
        if isinstance(layer, FSDPModule):  # which gathers its own weight
            return super()._model_logits(**inputs)
        shard = layer.weight
        layer.weight = torch.nn.Parameter(gather(shard), requires_grad=False)
        try:
            return super()._model_logits(**inputs)
        finally:
            layer.weight = shard

    def _plain_head(self) -> LMHead:
        self.reshard()
        weight, bias = self._head.weight, self._head.bias
        return replace(self._head, weight=gather(weight), bias=None if bias is None else gather(bias))

    def reshard(self) -> None:
        """Lets go of what forward passes have left gathered, which no later update would reach."""
        for unit in self._units:
            unit.reshard()


def spread(source: PolicySource, *, config: Config, world: World, streams: bool = False) -> tuple[Policy, Policy]:
    """Loads the policy to train, and the one that this rank's engine reads: the same, or a whole mirror of shards.

    Args:
        source: of both.
        config: of the run.
        world: its ranks.
        streams: whether engines read whole weights from the shards alone.
    """
    if config.fsdp == "no_shard":
        whole = world.each(source.load)
        check_weights(whole.model.named_parameters(), world)
        return whole, whole
    mirrored = not streams and (config.rollout != "vllm-http" or world.is_main)
    mirror = world.each(lambda: _load_mirror(source) if mirrored else None)
    policy = load_sharded(source, mirror, config=config, world=world, streams=streams)
    return policy, mirror or policy


def _load_mirror(source: PolicySource) -> Policy:
    """A whole policy, read a weight at a time if possible, so that none of the ranks of a host has a copy there on the way."""
    try:
        mirror, stored = source.load_hollow(trained=False)
    except NotInPartsError:
        mirror = source.load(trained=False)
    else:
        give_memory(mirror.model.parameters())
        stored.fill(mirror.model)
        mirror.try_out()
    mirror.model.requires_grad_(False)
    return mirror


def load_sharded(
    source: PolicySource,
    mirror: Policy | None,
    *,
    config: Config,
    world: World,
    streams: bool = False,
    trained: bool = True,
) -> ShardedPolicy:
    """Loads a policy in parts: each rank its own, where the files allow that, else the whole one first.

    Args:
        source: of the policy.
        mirror: see :class:`ShardedPolicy`.
        config: how to shard.
        world: over whom.
        streams: see :class:`ShardedPolicy`.
        trained: whether it will be; else its weights have the type in which they are gathered anyway.
    """
    try:
        hollow, stored = world.each(lambda: source.load_hollow(trained=trained))
    except NotInPartsError as error:
        if world.is_main:
            _log.warning("every rank reads the whole model before it keeps its part, because %s", error)
        whole = world.each(lambda: source.load(trained=trained))
        check_weights(whole.model.named_parameters(), world)
        return ShardedPolicy(whole, mirror, config=config, world=world, streams=streams)
    check_weights(stored.beginnings(), world)
    policy = world.each(lambda: ShardedPolicy(hollow, mirror, config=config, world=world, streams=streams, stored=stored))
    policy.try_out()
    return policy


def load_reference(source: PolicySource, *, config: Config, world: World) -> ShardedPolicy:
    """Loads a policy in parts that is not trained, and scores as one that is; one that follows it keeps float32 as well."""
    head: Any = source.outline().get_output_embeddings()
    is_plain = getattr(head, "bias", None) is None  # a bias is added in the type that it is kept in
    return load_sharded(source, None, config=config, world=world, trained=config.sync_ref_model or not is_plain)


def save_optimizer(policy: ShardedPolicy, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Writes what every rank holds of the optimiser's state; nothing before the first step.

    Raises:
        ShardsError: a rank could not; raised on all.
    """
    policy.reshard()
    if optimizer.state:
        state = get_optimizer_state_dict(policy.model, optimizer)
        save_shards(state, directory)


def load_sharded_optimizer(policy: Policy, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Puts back what any number of ranks wrote, into a sharded optimiser or a whole one."""
    if not directory.is_dir():
        return
    if isinstance(policy, ShardedPolicy):
        policy.reshard()
    state = get_optimizer_state_dict(policy.model, optimizer)
    load_shards(state, directory)
    set_optimizer_state_dict(policy.model, optimizer, state)


def load_whole_optimizer(policy: Policy, optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Puts back what one process wrote, into a whole optimiser or a sharded one."""
    saved = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(policy, ShardedPolicy):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        saved["state"] = {
            number: {name: _shard_like(parameters[number], value) for name, value in state.items()}
            for number, state in saved["state"].items()
        }
    load_state(optimizer, saved)


def _shard_like(parameter: DTensor, value: Any) -> Any:
    """A rank's own part of a whole tensor, without asking others; numbers stay whole."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def _mesh(config: Config, world: World, device: torch.device) -> DeviceMesh:
    """All ranks in one row, or a row for each node."""
    if config.fsdp != "hybrid_shard":
        return init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))
    rows = world.size // world.ranks_per_node  # which are as many on each node: see the handshake
    return init_device_mesh(device.type, (rows, world.ranks_per_node), mesh_dim_names=("replicate", "shard"))
