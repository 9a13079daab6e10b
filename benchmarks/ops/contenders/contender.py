"""What an adapter is: a name, a package, and a function that binds one problem to one call."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from benchmarks.ops.cases import Case
from benchmarks.ops.inputs import HeadProblem
from grpo_fast.device import package_version
from grpo_fast.ops import policy_loss


class HeadResult(NamedTuple):
    """What a contender returns of a head case; ``None`` for what it does not make."""

    loss: torch.Tensor | None
    logprobs: torch.Tensor | None = None
    """[T], nats."""
    entropy: torch.Tensor | None = None
    """[T], nats."""
    gradients: tuple[torch.Tensor, ...] = ()
    """One for each of ``HeadProblem.inputs``."""


Call: TypeAlias = Callable[[], Any]
Score: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor | None]]
"""``(hidden, weight, targets, want_entropy)`` to log-probabilities and entropy."""


def anything(case: Case, device: torch.device) -> str | None:
    """Refuses nothing."""
    return None


@dataclass(frozen=True)
class Contender:
    """One implementation of one kind of case."""

    name: str
    kind: Literal["head", "advantage", "loss"]
    prepare: Callable[[Any, Any], Call]
    """Binds a problem and one of ``options``; imports the package, so that a missing one shows here."""
    settings: str
    """What it runs with, for the reader of a result."""
    package: str = "torch"
    """Distribution whose version goes into the result."""
    options: tuple[Any, ...] = (None,)
    """Settings among which a trial on the case itself chooses the fastest."""
    refuses: Callable[[Any, torch.device], str | None] = anything
    """Why it cannot take a case, in words; ``None`` where it can."""
    role: Literal["ours", "rival", "floor"] = "rival"
    """``floor``: bare matrix products or copies, the least that anything could cost; it has no result to judge."""
    core: bool = True
    """Whether it runs in every case, or only in those with ``every_rival``."""

    def version(self) -> str | None:
        """Of its package; ``None`` where that is not installed."""
        return package_version(self.package)


def from_logprobs(problem: HeadProblem, score: Score, *, loss_impl: Any = "auto") -> Call:
    """A whole case from a function for log-probabilities; the loss on top, a few numbers a token, is the same for all."""
    case = problem.case

    def forward() -> HeadResult:
        with torch.no_grad():
            return HeadResult(None, *score(problem.hidden, problem.weight, problem.targets, case.entropy))

    def train() -> HeadResult:
        logprobs, entropy = score(problem.hidden, problem.weight, problem.targets, case.entropy)
        loss = policy_loss(logprobs, problem.batch, spec=problem.spec, entropy=entropy, impl=loss_impl).loss
        gradients = torch.autograd.grad(loss, problem.inputs)
        return HeadResult(loss.detach(), logprobs.detach(), None if entropy is None else entropy.detach(), gradients)

    return forward if case.objective == "forward" else train


def only_cross_entropy(case: Any, device: torch.device) -> str | None:
    """For what takes no weight or advantage per token."""
    return None if case.objective == "cross_entropy" else "it makes a mean cross-entropy only; no weights per token"


def needs_gpu(case: Any, device: torch.device) -> str | None:
    """For what has no CPU path."""
    return None if device.type == "cuda" else "it runs on GPUs only"


def bare_import(name: str) -> ModuleType:
    """Imports a module without running the ``__init__`` of the packages above it.

    Some of those patch torch, refuse to load without a GPU, or pull in whole training stacks; the module with the kernels
    needs none of it.

    Raises:
        ImportError: the package is not installed, or the module cannot be imported.
    """
    parents = name.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        parent = ".".join(parents[:depth])
        if parent in sys.modules:
            continue
        if depth == 1:
            spec = importlib.util.find_spec(parent)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {parent!r}")
            path = list(spec.submodule_search_locations or ())
        else:
            above = sys.modules[".".join(parents[: depth - 1])]
            path = [str(Path(folder) / parents[depth - 1]) for folder in above.__path__]
        module = ModuleType(parent)
        module.__path__ = path
        sys.modules[parent] = module
    return importlib.import_module(name)
