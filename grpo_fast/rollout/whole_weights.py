"""A policy's weights as engines take them: whole, one after the other, wherever they lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class GatheringModel(Protocol):
    """A model of whose weights this process holds a part."""

    def gathered(self, names: Sequence[str], dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole weights, some of them at a time; see :func:`whole_weights`."""
        ...


def whole_weights(
    model: torch.nn.Module, names: Iterable[str], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by name, in the order of ``names``; sharded ones are gathered when their turn comes.

    Where ranks gather each on its own, every one has to iterate, in the same order.

    Args:
        model: the policy's.
        names: of its parameters.
        dtype: what shards of floating point are gathered in, which is the same as converting them afterwards; ``None`` is their
            own type. Weights that are whole stay as they are.
    """
    names = list(names)
    if isinstance(model, GatheringModel):
        return model.gathered(names, dtype)
    weights = dict(model.named_parameters())
    return ((name, gather(weights[name], dtype)) for name in names)


def gather(weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """One weight, detached; a shard is gathered, which all of its ranks have to do, in ``dtype`` where that is given.

    Shards in the host's memory are first copied to their ranks' devices, which exchange faster than hosts do.
    """
    shard: Any = weight.detach()
    if not hasattr(shard, "full_tensor"):
        return weight.detach()
    shard = shard.to(dtype) if dtype is not None and shard.is_floating_point() else shard
    place = shard.device_mesh.device_type
    whole: torch.Tensor = (shard if shard.device.type == place else shard.to(place)).full_tensor()
    return whole
