"""What is measured, as data: one dataclass a kind of case, one list a kind of device, the most important first.

A case names sizes and semantics only. ``smoke`` gives the same case at sizes that take milliseconds on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, TypeAlias

Objective: TypeAlias = Literal["token", "sequence", "cross_entropy", "forward"]
"""``token`` and ``sequence``: clipped GRPO loss and its gradients, the ratio a token's or a sequence's. ``cross_entropy``: mean
negative log-probability and its gradients, all that some rivals know. ``forward``: log-probabilities without gradient."""

GROUP = 4
"""Completions of a prompt in head cases; dead rows come in whole groups."""


@dataclass(frozen=True)
class Model:
    """The head of a published model."""

    name: str
    hidden_size: int
    vocab_size: int


QWEN_05B = Model("Qwen2.5-0.5B", 896, 151_936)
QWEN_15B = Model("Qwen2.5-1.5B", 1536, 151_936)
QWEN_3B = Model("Qwen2.5-3B", 2048, 151_936)
QWEN_7B = Model("Qwen2.5-7B", 3584, 151_936)
LLAMA_3B = Model("Llama-3.2-3B", 3072, 128_256)
LLAMA_8B = Model("Llama-3.1-8B", 4096, 128_256)
SMOLLM2 = Model("SmolLM2-135M", 576, 49_152)
MODELS = (QWEN_05B, QWEN_15B, QWEN_7B, LLAMA_3B, LLAMA_8B)


@dataclass(frozen=True)
class HeadCase:
    """From hidden rows and a head to log-probabilities, or to a loss and its gradients."""

    model: Model
    num_tokens: int
    objective: Objective = "token"
    frozen_head: bool = False
    dead_share: float = 0.0
    """Share of rows whose whole group has advantage 0."""
    entropy: bool = False
    """Forward: the entropy is asked for. Losses: it is in the loss, with a gradient."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    every_rival: bool = False
    """Also those that a long list of cases need not repeat: torch.compile, Liger's older paths, PyTorch's own op."""
    num_sequences: int = 16

    kind = "head"

    @property
    def name(self) -> str:
        """Unique among the cases, and stable: results are merged by it."""
        parts = [self.model.name, f"T={self.num_tokens}", self.objective.replace("_", " ")]
        parts += ["frozen head"] * self.frozen_head + [f"{self.dead_share:.0%} dead"] * (self.dead_share > 0)
        parts += ["entropy"] * self.entropy + [self.dtype] * (self.dtype != "bfloat16")
        return ", ".join(parts)

    @property
    def num_products(self) -> int:
        """Matrix products of T·H·V multiply-adds that the case cannot do without."""
        return 1 if self.objective == "forward" else 3 - self.frozen_head

    @property
    def num_flops(self) -> float:
        """Floating-point operations of those, when every row is alive."""
        return 2.0 * self.num_products * self.num_tokens * self.model.hidden_size * self.model.vocab_size

    def smoke(self) -> HeadCase:
        """The case in miniature; sizes stay unlike each other and odd."""
        sizes = Model(self.model.name, self.model.hidden_size // 64 + 17, self.model.vocab_size // 512 + 1)
        return replace(self, model=sizes, num_tokens=self.num_tokens // 4096 * self.num_sequences + 64, dtype="float32")


@dataclass(frozen=True)
class AdvantageCase:
    """Rewards [P, G] to advantages."""

    num_prompts: int
    group_size: int
    scale_rewards: Literal["group", "none"] = "group"

    kind = "advantage"
    every_rival = True

    @property
    def name(self) -> str:
        """Unique among the cases, and stable."""
        return f"group_advantage, {self.num_prompts} x {self.group_size}, {self.scale_rewards}"

    @property
    def num_bytes(self) -> float:
        """float32 rewards read and advantages written; of a group, its mean, deviation and flag."""
        return 8.0 * self.num_prompts * self.group_size + 9.0 * self.num_prompts

    def smoke(self) -> AdvantageCase:
        """The case in miniature."""
        return replace(self, num_prompts=min(self.num_prompts, 37))


@dataclass(frozen=True)
class LossCase:
    """Log-probabilities of packed tokens to the clipped loss and its gradient."""

    num_tokens: int
    objective: Literal["token", "sequence"] = "token"
    num_sequences: int = 16

    kind = "loss"
    every_rival = True

    @property
    def name(self) -> str:
        """Unique among the cases, and stable."""
        return f"policy_loss, T={self.num_tokens}, {self.objective}"

    @property
    def num_bytes(self) -> float:
        """What any implementation must move of float32: new and old log-probabilities read, the gradient written."""
        return 12.0 * self.num_tokens

    def smoke(self) -> LossCase:
        """The case in miniature."""
        return replace(self, num_tokens=min(self.num_tokens, 512), num_sequences=8)


Case: TypeAlias = HeadCase | AdvantageCase | LossCase


def gpu_cases() -> list[Case]:
    """Cases of a GPU; the design target (T = 16,384, H = 2048, V = 151,936) comes first."""
    target = HeadCase(QWEN_3B, 16_384, every_rival=True)
    cases: list[Case] = [
        target,
        replace(target, dead_share=0.5),
        replace(target, frozen_head=True),
        replace(target, objective="forward", entropy=True),
        LossCase(2**24, num_sequences=4096),
        AdvantageCase(2**20, 16),
        replace(target, objective="cross_entropy"),
    ]
    base = replace(target, every_rival=False)
    cases += [replace(base, model=model) for model in MODELS]
    cases += [
        replace(base, num_tokens=2048),
        replace(base, dead_share=0.25),
        replace(base, dead_share=0.75),
        replace(base, objective="sequence"),
        replace(base, entropy=True),
        replace(base, num_tokens=8192),
        replace(base, num_tokens=4096),
        LossCase(2**24, "sequence", num_sequences=4096),
        LossCase(16_384),
        AdvantageCase(64, 16),
        AdvantageCase(2**20, 16, "none"),
    ]
    cases += _grid()
    return list(dict.fromkeys(cases))


def _grid() -> Iterator[HeadCase]:
    """Everything else, by what it says beyond the cases above."""
    long, short = 16_384, 2048
    for model in MODELS:
        yield HeadCase(model, long, frozen_head=True)
        yield HeadCase(model, long, dead_share=0.5)
        yield HeadCase(model, long, objective="forward", entropy=True)
    for model in MODELS:
        yield HeadCase(model, short)
        yield HeadCase(model, long, objective="sequence", dead_share=0.5)
        yield HeadCase(model, long, objective="forward")
        yield HeadCase(model, long, entropy=True)
    for num_tokens, model, frozen, dead in product((long, short), MODELS, (False, True), (0.0, 0.25, 0.5, 0.75)):
        yield HeadCase(model, num_tokens, frozen_head=frozen, dead_share=dead)
    for model, frozen in product(MODELS, (False, True)):
        yield HeadCase(model, short, objective="sequence", frozen_head=frozen)
        yield HeadCase(model, short, objective="forward", entropy=not frozen)


def cpu_cases() -> list[Case]:
    """Cases of a CPU in float32; the first is the one that the project promises something about."""
    target = HeadCase(SMOLLM2, 2048, dtype="float32", every_rival=True)
    base = replace(target, num_tokens=512, every_rival=False)
    return [
        target,
        LossCase(2**20, num_sequences=1024),
        AdvantageCase(2**16, 16),
        base,
        replace(base, dead_share=0.5),
        replace(base, frozen_head=True),
        replace(base, objective="forward", entropy=True),
        replace(base, model=Model("SmolLM2-135M, 16k vocabulary", 576, 16_384)),
        replace(base, model=Model("SmolLM2-135M, 100k vocabulary", 576, 98_304)),
        replace(base, num_tokens=1024),
        replace(base, dead_share=0.25),
        replace(base, dead_share=0.75),
        replace(base, objective="sequence"),
        replace(base, entropy=True),
        replace(base, objective="cross_entropy", every_rival=True),
        replace(base, objective="forward"),
        LossCase(16_384),
        LossCase(2**20, "sequence", num_sequences=1024),
        AdvantageCase(64, 16),
        replace(base, model=QWEN_05B),
        replace(target, dead_share=0.5, every_rival=False),
        replace(target, frozen_head=True, every_rival=False),
    ]


def smoke_cases(cases: Iterable[Case] | None = None) -> list[Case]:
    """Cases, all there are by default, in miniature; of two that shrink to the same, the one with more rivals."""
    found: dict[str, Case] = {}
    for case in (case.smoke() for case in cases or [*cpu_cases(), *gpu_cases()]):
        if case.name not in found or case.every_rival:
            found[case.name] = case
    return list(found.values())
