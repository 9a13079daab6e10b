"""Sends sharded weights to an engine or into a file, one whole FSDP unit at a time, without a full copy on any rank.

Rank 0 talks to the engine, and only it knows how a sync goes: whether the base or adapters are sent, whether an attempt is
repeated, when it is given up. So it leads: before it gathers a unit, or computes what the probe of a sync wants to know, it
tells the other ranks, which do the same until they are told that it is done. An engine that fails or hangs costs them nothing
but the time until then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from grpo_fast.config import Config
from grpo_fast.rollout.whole_weights import gather
from grpo_fast.train.distributed import World

_T = TypeVar("_T")


def streams_weights(config: Config) -> bool:
    """Whether several ranks that shard give an engine its weights without a mirror: servers."""
    return config.fsdp != "no_shard" and config.rollout == "vllm-http"


class Once(Protocol):
    """Lets rank 0 do something for all ranks."""

    def once(self, make: Callable[[], _T]) -> _T:
        """Calls ``make`` on rank 0 alone; see :meth:`~grpo_fast.train.distributed.World.once`."""
        ...


class _Gather(NamedTuple):
    """Names of one unit's weights, and the type in which they are sent."""

    names: tuple[str, ...]
    dtype: torch.dtype | None


class _Score(NamedTuple):
    """Tokens [B, S], and the positions of the wanted logits; in host memory, as they go to other ranks' devices."""

    input_ids: torch.Tensor
    positions: torch.Tensor


class StreamedModel(torch.nn.Module):
    """A sharded model as an engine reads it on rank 0, inside :meth:`once`.

    Args:
        model: sharded.
        units: its parts that are gathered together, each within no other but the last ones.
        logits: the model's [B, K, V] for tokens [B, S] at K positions; every rank has to ask for them.
        world: the ranks.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        units: Sequence[torch.nn.Module],
        logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        world: World,
    ) -> None:
        super().__init__()
        self._model = model
        self._weights = dict(model.named_parameters())
        self._unit_of = _units_by_name(model, units)
        self._logits = logits
        self._world = world
        self._asking = threading.Lock()
        self._open = False

    def __getattr__(self, name: str) -> Any:
        """Everything else that an engine reads is the model's: its configuration, and that of its adapters."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_model"), name)

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The shards, under the model's own names."""
        yield from self._weights.items()

    def once(self, make: Callable[[], _T]) -> _T:
        """Calls ``make`` on rank 0, where it may read whole weights; the others gather with it until it is done.

        Raises:
            Exception: what it raised, on every rank.
            RankLostError: a rank is gone.
        """

        def lead() -> _T:
            self._open = True
            try:
                return make()
            finally:
                with self._asking:  # what is being gathered comes to its end first
                    self._open = False
                    self._world.once(lambda: None)

        if not self._world.is_main:
            self._follow()
        return self._world.once(lead)

    def gathered(self, names: Sequence[str], dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole weights in the order of ``names``, a unit's at a time; see :class:`~.whole_weights.GatheringModel`.

        Raises:
            RuntimeError: it is called outside :meth:`once`, or after its end.
        """
        for _, unit in groupby(names, key=self._unit_of.__getitem__):
            weights = self._ask(_Gather(tuple(unit), dtype))
            while weights:
                yield weights.pop(0)

    def forward(self, input_ids: torch.Tensor, *, logits_to_keep: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        """The model's logits at some positions, as ``logits`` [B, K, V].

        Args:
            input_ids: [B, S].
            logits_to_keep: K positions.
            use_cache: not done.

        Raises:
            RuntimeError: it is not inside :meth:`once`.
        """
        del use_cache
        return SimpleNamespace(logits=self._ask(_Score(input_ids.cpu(), logits_to_keep.cpu())))

    def _ask(self, what: _Gather | _Score) -> Any:
        with self._asking:
            if not self._open:
                raise RuntimeError("weights were requested after the gather on rank 0 had ended; read them inside once()")
            self._world.once(lambda: what)
            with self._world.watched():
                return self._answer(what)

    def _follow(self) -> None:
        while (asked := self._world.once(lambda: None)) is not None:
            with self._world.watched():
                self._answer(asked)

    @torch.no_grad()
    def _answer(self, what: _Gather | _Score) -> Any:
        if isinstance(what, _Gather):
            return [(name, gather(self._weights[name], what.dtype)) for name in what.names]
        return self._logits(what.input_ids, what.positions)


def _units_by_name(model: torch.nn.Module, units: Sequence[torch.nn.Module]) -> dict[str, int]:
    """Number of the innermost unit of each parameter."""
    number_of = {id(unit): number for number, unit in enumerate(units)}
    paths = {path: number_of[id(module)] for path, module in model.named_modules() if id(module) in number_of}
    by_depth = sorted(paths, key=len, reverse=True)
    return {
        name: next((paths[path] for path in by_depth if not path or name.startswith(f"{path}.")), len(units))
        for name, _ in model.named_parameters()
    }
