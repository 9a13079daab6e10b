"""The largest micro-batches of a step that nobody has sampled yet: how long their sequences are and how they are laid out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from grpo_fast.config import Config
from grpo_fast.ops import Layout, plan_rows
from grpo_fast.ops.row_plan import MicroBatch
from grpo_fast.train.activations import DryPass
from grpo_fast.train.batch import TrainingSequence, shared_prompts
from grpo_fast.train.packed_model import attention_of, let_pack, let_pad, takes_shared_prompts

_VARLEN_HEAD_SIZE = 256
"""Largest head size that torch's variable-length kernel takes."""


@dataclass(frozen=True)
class StepLengths:
    """Lengths of a step, in tokens.

    Attributes:
        prompt: of each prompt.
        completions: of completions, group after group; taken again from the start where there are fewer than the step has.
        num_devices: devices that share the sequences.
    """

    prompt: int
    completions: Sequence[int]
    num_devices: int


def largest_passes(
    outline: PreTrainedModel, config: Config, lengths: StepLengths, *, dtype: torch.dtype, kind: str
) -> list[DryPass]:
    """Cuts a step as the update would, every sequence being live, and takes the micro-batches that may be the fullest.

    The first one of an update meets no gradients yet, later ones do: of those it is the largest, and the first where that
    is larger still.

    Args:
        outline: the model, whose attention is torch's own.
        config: of the run.
        lengths: of the step's sequences.
        dtype: type of computation.
        kind: "cuda" or "cpu".
    """
    layout, shares = _layout(outline, config, kind)
    sequences = _sequences(config, lengths)
    plan = plan_rows(
        [len(sequence) for sequence in sequences],
        [len(sequence.completion_ids) for sequence in sequences],
        live=[True] * len(sequences),
        token_budget=config.microbatch_tokens(kind),
        layout=shared_prompts(sequences) if shares else layout,
    )
    one_kernel = layout == "packed" and not shares and _is_one_kernel(outline, config, dtype=dtype, kind=kind)

    def dry_pass(batch: MicroBatch, *, accumulates: bool) -> DryPass:
        chosen = [sequences[number] for number in batch.sequences]
        return DryPass(chosen, layout, shares, one_kernel, accumulates, dtype, kind)

    first, *later = plan.micro_batches
    if not later:
        return [dry_pass(first, accumulates=False)]
    largest = max(later, key=_size)
    passes = [dry_pass(largest, accumulates=True)]
    return [dry_pass(first, accumulates=False), *passes] if _size(first) > _size(largest) else passes


def _size(batch: MicroBatch) -> tuple[int, int]:
    return batch.num_tokens, batch.num_rows


def _sequences(config: Config, lengths: StepLengths) -> list[TrainingSequence]:
    """Sequences of one device. Their tokens are arbitrary, except that different prompts have different ones."""
    count = -(-config.prompts_per_step * config.num_generations // lengths.num_devices)
    completions = itertools.islice(itertools.cycle(lengths.completions), count)
    return [
        TrainingSequence(
            prompt_ids=(number // config.num_generations,) * lengths.prompt,
            completion_ids=(0,) * length,
            sampling_logprobs=(0.0,) * length,
            advantage=1.0,
            in_loss=True,
        )
        for number, length in enumerate(completions)
    ]


def _layout(outline: PreTrainedModel, config: Config, kind: str) -> tuple[Layout, bool]:
    """Layout of the sequences, and whether they share prompts, chosen as :class:`Policy` and :class:`Learner` do."""
    if config.padding_free is False:
        return "padded", False
    attention = attention_of(outline, config.attn_implementation)
    if attention.startswith("flash_attention"):
        return "packed", False
    takes = attention in {"sdpa", "eager"} and let_pack(outline) is None and takes_shared_prompts(outline)
    let_pad(outline)
    if not takes:
        return "padded", False
    return "packed", kind == "cpu" if config.share_prompts is None else config.share_prompts


def _is_one_kernel(outline: PreTrainedModel, config: Config, *, dtype: torch.dtype, kind: str) -> bool:
    """Whether a packed row goes to one attention kernel as it is, whatever lengths lie in it."""
    if attention_of(outline, config.attn_implementation).startswith("flash_attention"):
        return True
    text = outline.config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    return kind == "cuda" and dtype == torch.bfloat16 and not capped and size <= _VARLEN_HEAD_SIZE
