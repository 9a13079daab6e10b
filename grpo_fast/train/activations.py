"""Memory that the forward and backward pass of a micro-batch hold at once, found without running them.

The model is built and run on tensors that have shapes and no memory, forward and backward, with the attention, the layout, the
adapters, the checkpointing and the precision of the run. Memory that operators make is recorded when it is allocated and when
it is freed, so that only what is held at the same time is added up. The head stands in for the fused loss and takes the same
memory.

Instead of all repeating layers, a few are run, and then two more: bytes at the peak are linear in their number, in the forward
pass, at the loss, in the first half of the backward pass and in the second.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from grpo_fast.config import Config
from grpo_fast.ops import Layout, PackedLayout
from grpo_fast.train.batch import TrainingSequence, build_batch
from grpo_fast.train.checkpointing import checkpoint_layers, let_checkpoint
from grpo_fast.train.ledger import OTHER, Ledger
from grpo_fast.train.offload import HostActivations
from grpo_fast.train.packed_model import attention_of, let_pack, model_inputs
from grpo_fast.train.policy_source import outline_of
from grpo_fast.types import TokenBatch

_CAUSAL = "causal_only"
_KINDS = (OTHER, "gradients", "head", "waiting")
_CPU = torch.device("cpu")
_Data = TypeVar("_Data", TokenBatch, PackedLayout)


@dataclass(frozen=True)
class HeadBytes:
    """Memory of the loss on a device.

    Attributes:
        rows: V, or the part of the vocabulary that is this rank's.
        passing: bytes that are held while losses are computed: a block of exponentials, copies.
    """

    rows: int
    passing: int


@dataclass(frozen=True)
class DryPass:
    """A micro-batch, and how it is computed.

    Attributes:
        sequences: B of them.
        layout: how the model gets them.
        shares_prompts: whether a prompt is computed once for all of its completions.
        one_kernel: whether attention takes a packed row as it is, as torch's variable-length kernel does.
        accumulates: whether gradients of other micro-batches are there already; then those of this one are freed at once.
        dtype: type of computation.
        kind: "cuda" or "cpu", which rounds the tokens of a row up.
    """

    sequences: Sequence[TrainingSequence]
    layout: Layout
    shares_prompts: bool
    one_kernel: bool
    accumulates: bool
    dtype: torch.dtype
    kind: str


@dataclass(frozen=True)
class HeldBytes:
    """Bytes that are held at once.

    Attributes:
        activations: made by the passes, weights' gradients in transit included.
        gradients: those of the body's weights.
        head: the loss's own, the head's gradient included.
    """

    activations: int
    gradients: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.activations + self.gradients + self.head


@dataclass(frozen=True)
class PassBytes:
    """Memory of a micro-batch.

    Attributes:
        losses: at the peak of the forward pass, the loss included.
        gradients: at the peak of the backward pass.
        waiting: bytes in the host's memory meanwhile.
    """

    losses: HeldBytes
    gradients: HeldBytes
    waiting: int


class UncountableError(RuntimeError):
    """A model's passes need numbers, or operators, that tensors without memory do not have."""


def pass_bytes(outline: PreTrainedModel, config: Config, work: DryPass, head: HeadBytes) -> PassBytes:
    """Counts the memory that a micro-batch takes.

    Args:
        outline: the model, adapters included, as :func:`outline_of` gives it; stays as it is.
        config: the run's; read are adapters, checkpointing, attention and the type of trained weights.
        work: the micro-batch.
        head: what the loss takes.

    Raises:
        UncountableError: the passes fail; packed, as they would in a run, which then pads.
    """
    model_config: PreTrainedConfig = outline.config
    count = int(model_config.get_text_config().num_hidden_layers)
    period = _period(outline)
    fewest = (4 if _waits_on_host(config) else 2) * period  # there, inputs are fetched while the layer before is at work
    most = fewest + 2 * period
    if count <= most:
        found = _windows(copy.deepcopy(model_config), config, work, head)
    else:
        near, far = (_windows(_shallow(model_config, number), config, work, head) for number in (fewest, most))
        found = np.rint(near + (far - near) * (count - fewest) / (most - fewest)).astype(np.int64)
    forward, loss, first, second = (HeldBytes(*row[:3].tolist()) for row in found)
    losses, gradients = (max(pair, key=lambda held: held.total) for pair in ((forward, loss), (first, second)))
    return PassBytes(losses, gradients, waiting=int(found[0, 3]))


def _windows(model_config: PreTrainedConfig, config: Config, work: DryPass, head: HeadBytes) -> npt.NDArray[np.int64]:
    """[4, kinds] bytes at the peak of the forward pass, of the loss, and of both halves of the backward pass."""
    ledger = Ledger()
    try:
        with _quiet():
            loss, backward = _run(ledger, model_config, config, work, head)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UncountableError(f"passes of {model_config.model_type} cannot be run without memory ({error})") from error
    held = ledger.held(_KINDS)
    on_device = held[:3].sum(axis=0)
    half = (backward + ledger.now) // 2
    result = []
    for low, high in pairwise((0, loss, backward, half, ledger.now)):
        at = low + int(on_device[low:high].argmax())
        result.append([*held[:3, at], held[3].max()])
    return np.array(result)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch would log a traceback of what is raised."""
    log = logging.getLogger(FakeTensorMode.__module__)
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _run(ledger: Ledger, model_config: PreTrainedConfig, config: Config, work: DryPass, head: HeadBytes) -> tuple[int, int]:
    """Runs the passes; returns at which of the ledger's changes the loss and the backward pass begin."""
    model: Any = outline_of(model_config, config)
    model.eval()
    if config.gradient_checkpointing:
        checkpoint_layers(model, config.gradient_checkpointing_mode)
        let_checkpoint(model)
    device = torch.device("cpu" if work.kind == "cpu" else "meta")
    ones = [1.0] * len(work.sequences)
    made = build_batch(work.sequences, ones, device, layout=work.layout, shares_prompts=work.shares_prompts)
    with FakeTensorMode(allow_non_fake_inputs=True):  # scalars that models make on their way
        batch = _without_memory(made)
        _give_weights(model, config, work.dtype)
        known = model.get_output_embeddings().weight
        # separate even if tied to the embedding: autograd adds to a gradient in place, but not to one without memory
        weight = torch.empty(head.rows, known.shape[1], dtype=known.dtype, requires_grad=known.requires_grad)
        trained = [one for one in model.base_model.parameters() if one.requires_grad]
        for one in (*trained, weight) if work.accumulates else ():
            if one.requires_grad:
                one.register_post_accumulate_grad_hook(_drop)
        with ledger:
            rows = _scored_hidden_states(model, batch, config, work, ledger)
            at_loss = ledger.now
            loss = _Head.apply(rows, weight, ledger, head.passing)  # type: ignore[no-untyped-call]
            del rows
            at_backward = ledger.now
            loss.backward()
        ledger.rename([one.grad for one in trained if one.grad is not None], "gradients")
    return at_loss, at_backward


def _drop(weight: torch.Tensor) -> None:
    weight.grad = None


def _without_memory(value: _Data) -> _Data:
    """The same with tensors without memory, of the fake mode that is active."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        if isinstance(own, torch.Tensor):
            changed[field.name] = torch.empty_like(own, device=_CPU)
        elif isinstance(own, PackedLayout):
            changed[field.name] = _without_memory(own)
    return dataclasses.replace(value, **changed)


def _give_weights(model: torch.nn.Module, config: Config, dtype: torch.dtype) -> None:
    """Stand-ins of weights and buffers, of the types that :meth:`PolicySource.load` gives them."""
    short = dtype == torch.bfloat16 and (config.use_peft or config.weights_dtype == "bfloat16")
    base = torch.bfloat16 if short else torch.float32
    made: dict[int, torch.nn.Parameter] = {}
    for path, module in model.named_modules():
        own = torch.float32 if ".lora_" in path else base
        for name, weight in module._parameters.items():
            if weight is not None:
                stand_in = torch.nn.Parameter(torch.empty(weight.shape, dtype=own), requires_grad=weight.requires_grad)
                module._parameters[name] = made.setdefault(id(weight), stand_in)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _scored_hidden_states(model: Any, batch: TokenBatch, config: Config, work: DryPass, ledger: Ledger) -> torch.Tensor:
    """As :meth:`Policy.scored_hidden_states`."""
    inputs = _inputs(model, batch, config, work)
    with _Host(ledger).keep() if _waits_on_host(config) else contextlib.nullcontext():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=work.dtype == torch.bfloat16):
            hidden: torch.Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)[batch.row_index]


def _waits_on_host(config: Config) -> bool:
    return config.gradient_checkpointing and config.gradient_checkpointing_mode == "offload"


class _Host(HostActivations):
    """Marks in a ledger what is not on the device."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(_CPU)
        self._ledger = ledger

    def _put(self, tensor: torch.Tensor) -> Any:
        with self._ledger.making("waiting"):
            return super()._put(tensor)


def _inputs(model: Any, batch: TokenBatch, config: Config, work: DryPass) -> dict[str, Any]:
    """Keywords of the body, once its attention is the one that the run's would be."""
    mask = batch.attention_mask
    is_eager = attention_of(model, config.attn_implementation) == "eager"
    if work.layout == "packed" and not work.one_kernel:
        let_pack(model)
        return model_inputs(model, batch)
    inputs = {"input_ids": batch.input_ids}
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    ragged = len({len(sequence) for sequence in work.sequences}) > 1
    if mask is None or work.one_kernel or not (ragged or is_eager):
        model.set_attn_implementation(_CAUSAL)
        return inputs
    # four dimensions count as finished: transformers would read a mask's values, and this one has none
    kind = torch.bool
    if is_eager:
        model.set_attn_implementation("eager")
        kind = torch.float32
    return inputs | {"attention_mask": torch.empty(mask.shape[0], 1, mask.shape[1], mask.shape[1], dtype=kind)}


class _Head(torch.autograd.Function):
    """Takes the memory of the fused loss: some while it runs, and gradients that wait for the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, ledger: Ledger, passing: int) -> torch.Tensor:
        with ledger.making("head"):
            passes = torch.empty(passing, dtype=torch.uint8)
            gradients = [torch.empty_like(rows)]
            if weight.requires_grad:
                gradients.append(torch.empty_like(weight, dtype=torch.float32))
            del passes
        ctx.save_for_backward(*gradients)
        ctx.dtype, ctx.ledger = weight.dtype, ledger
        return rows.new_empty(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, *weight = ctx.saved_tensors
        with ctx.ledger.making("head"):
            return rows, weight[0].to(ctx.dtype) if weight else None, None, None


def _shallow(model_config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    """The same model with its first layers alone."""
    result = copy.deepcopy(model_config)
    text = result.get_text_config()
    for name in _by_layer(text):
        setattr(text, name, getattr(text, name)[:count])
    text.num_hidden_layers = count
    return result


def _by_layer(text_config: Any) -> list[str]:
    """Names of what a text configuration says layer by layer."""
    return [
        name
        for name, value in text_config.to_dict().items()
        if isinstance(value, list) and len(value) == text_config.num_hidden_layers
    ]


def _period(outline: PreTrainedModel) -> int:
    """After how many layers the layers of a model repeat themselves; their number where they do not, or none are found."""
    text: Any = outline.config.get_text_config()
    count = int(text.num_hidden_layers)
    stacks = [each for each in outline.modules() if isinstance(each, torch.nn.ModuleList) and len(each) == count]
    if len(stacks) != 1:
        return count
    kinds = [
        (
            type(layer),
            tuple((name, weight.shape) for name, weight in layer.named_parameters()),
            tuple(getattr(text, name)[number] for name in _by_layer(text)),
        )
        for number, layer in enumerate(stacks[0])
    ]
    return next((step for step in range(1, count) if count % step == 0 and kinds[step:] == kinds[:-step]), count)


def _causal(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **_: Any
) -> tuple[torch.Tensor, None]:
    """Fused causal attention over whole rows, which keeps what it reads and writes, and no scores."""
    shared = query.shape[1] != key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_CAUSAL, _causal)
AttentionMaskInterface.register(_CAUSAL, flash_attention_mask)
