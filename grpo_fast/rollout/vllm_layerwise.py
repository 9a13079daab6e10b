"""Common to every transport of whole models: the source of the weights, and how a vLLM worker loads them.

A worker loads weights layer by layer through vLLM's own reload, so that whatever vLLM makes of a weight (fused, repacked,
sharded) is made anew.

Source: the interfaces are those of ``vllm.distributed.weight_transfer.base`` of vLLM 0.28 and later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from vllm.distributed.weight_transfer import ParamMeta, WeightTransferEngine
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from grpo_fast.rollout.whole_weights import whole_weights


class PolicyWeights:
    """The parameters of a model, one by one, in the type that the engine computes in.

    Of a model with LoRA adapters they are the base's, under the names that they have without; of one in four bits, what those
    stand for.

    Sharded parameters are gathered when their turn comes, in the engine's type, so no second copy of the model exists; see
    :func:`~grpo_fast.rollout.whole_weights.whole_weights`.

    Args:
        model: the policy.
        dtype: what the engine computes in.
        device: where what iteration yields lies; ``None`` leaves it where it is, as shards may be in host memory.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, device: torch.device | None = None) -> None:
        self._model = model
        self._dtype = dtype
        self._device = device

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole model, as it is sent."""
        return sum(self._sizes())

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest weight, as it is sent."""
        return max(self._sizes())

    def _sizes(self) -> Iterator[int]:
        return (torch.Size(meta.shape).numel() * meta.dtype.itemsize for meta in self.metadata)

    @property
    def metadata(self) -> list[ParamMeta]:
        """Name, type and whole shape of what iteration yields."""
        return [
            ParamMeta(without_adapters(name), self._wire(weight), tuple((_four_bits(weight) or weight).shape))
            for name, weight in self._base()
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        def convert(named: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
            return named[0], named[1].to(self._device, self._wire(named[1]))

        return map(convert, self.uncast())

    def uncast(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The same in the policy's own type, for a transport that converts while it copies."""
        states = {name: _four_bits(weight) for name, weight in self._base()}

        def read(named: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
            name, weight = named
            if states[name] is not None:
                weight = import_module("bitsandbytes.functional").dequantize_4bit(weight, states[name])
            return without_adapters(name), weight

        # No loop, which would hold each weight until the next is gathered.
        return map(read, whole_weights(self._model, states, self._dtype))

    def _base(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, weight) for name, weight in self._model.named_parameters() if ".lora_" not in name)

    def _wire(self, weight: torch.Tensor) -> torch.dtype:
        return self._dtype if weight.is_floating_point() or _four_bits(weight) is not None else weight.dtype


def without_adapters(name: str) -> str:
    """What a weight is called where no adapter lies over its layer, in peft's models and in vLLM's alike."""
    return name.replace(".base_layer.", ".")


def _four_bits(weight: torch.Tensor) -> Any:
    """How bitsandbytes quantised a weight; ``None`` for one that is whole."""
    return getattr(weight, "quant_state", None)


class LayerwiseReceiver(WeightTransferEngine):  # type: ignore[misc]
    """A worker's side: one update from its start to its end, with every parameter accounted for."""

    _begun = False

    def start_weight_update(self) -> None:
        """Prepares all layers; what an update before this one left half-done is dropped."""
        if self._begun:
            finalize_layerwise_reload(self.model, self.model_config)
        every = {without_adapters(name) for name, _ in self.model.named_parameters(remove_duplicate=False)}
        own = {without_adapters(name) for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)
        self._begun = True
        self._packed_heads = {module: module.cpu_linear for module in self._heads()} if every != own else {}
        self._missing = set(own)
        self._names_known = True

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Loads some of the weights, whose memory must stay as it is until their layers are complete.

        Raises:
            RuntimeError: the engine's model has no place for one; vLLM's own error need not say for which.
        """
        last = ""

        def note(named: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
            nonlocal last
            last = f"{named[0]} of shape {list(named[1].shape)}"
            return named

        try:
            loaded = self.model.load_weights(map(note, weights))
        except (AssertionError, KeyError, ValueError, RuntimeError) as error:
            raise RuntimeError(
                f"the engine's {type(self.model).__name__} cannot load the policy's {last} ({type(error).__name__}: "
                f"{error}); build the engine from the policy's configuration"
            ) from error
        if loaded is None:
            self._names_known = False
        else:
            self._missing -= {without_adapters(name) for name in loaded}

    def finish_weight_update(self) -> None:
        """Puts the weights in force.

        Raises:
            RuntimeError: parameters of the engine's model did not come; they are named.
        """
        finalize_layerwise_reload(self.model, self.model_config)
        self._begun = False
        self._repack_heads()
        if self._names_known and self._missing:
            names = sorted(self._missing)
            raise RuntimeError(f"{len(names)} parameters of the engine's model were not sent: {', '.join(names[:5])}")

    def _heads(self) -> Iterator[Any]:
        for module in self.model.modules():
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                yield module

    def _repack_heads(self) -> None:
        """On a CPU a head that is tied to the embedding multiplies with a packed copy, which layer-wise loading passes over."""
        heads = self._packed_heads.items()
        renewed = {module.weight: module.cpu_linear for module, old in heads if module.cpu_linear is not old}
        for module, old in heads:
            if module.cpu_linear is not old:
                continue
            if module.weight in renewed:
                module.cpu_linear = renewed[module.weight]
            else:
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)
        self._packed_heads = {}

    def keep_from(self, memory: torch.Tensor) -> None:
        """Copies what layers that are not complete still hold of ``memory``, so that it can be written to again."""
        place = memory.untyped_storage().data_ptr()

        def own(weight: torch.Tensor) -> torch.Tensor:
            held = weight.device == memory.device and weight.untyped_storage().data_ptr() == place
            return weight.clone() if held else weight

        for module in self.model.modules():
            for _, given in get_layerwise_info(module).loaded_weights:
                given.arguments.update(tree_map_only(torch.Tensor, own, dict(given.arguments)))
