"""The embedded rollout engine: samples from the very module the trainer updates, or from a copy that it renews. No server.

How a call runs:

1. Sequences are ordered by prompt length and cut into batches whose key-value cache stays within ``max_batch_tokens``.
2. A batch's prompts are read once each, left-padded, and their cache is copied to the G completions of each.
3. Every step appends one position in place, to all rows that are still open. Closed rows are replaced by open ones from the
   end of the batch, so that the tail of a batch costs what is left of it.
4. The host learns the tokens every ``check_every`` steps, in one transfer; what a sequence sampled past its end is dropped.

A sequence's draws depend on (seed, prompt position, generation index, token position) alone, so neither the cut nor the order
nor the shrinking changes what is sampled, but for ties that the last bit of a logit decides.

Not covered: encoder-decoders, recurrent layers, several devices, admission of new prompts into a running batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from grpo_fast.rollout.decode_batch import DecodeBatch, Rows, Stepping
from grpo_fast.rollout.end_tokens import end_token_ids
from grpo_fast.rollout.llama_step import supports
from grpo_fast.rollout.request import check_request
from grpo_fast.rollout.sampling import uniforms
from grpo_fast.rollout.transcript import Transcript
from grpo_fast.types import Completion

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from grpo_fast.rollout.engine import SamplingParams

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

MAX_BATCH_TOKENS = 65_536
"""Most cached positions of one batch, where nothing else is said."""


@dataclass(frozen=True, slots=True)
class _Row:
    """One sequence to sample."""

    prompt: int
    generation: int


class TransformersEngine:
    """Implements :class:`~grpo_fast.rollout.engine.RolloutEngine` with a transformers model.

    Args:
        model: decoder-only causal language model, on one device. The trainer goes on owning it: its modules keep their
            train or eval mode, and nothing of a rollout stays in it.
        tokenizer: decodes completions. Nothing is ever encoded.
        eos_token_ids: tokens that end a completion; ``None`` takes those of the model's generation configuration and of the
            tokenizer.
        max_batch_tokens: most cached positions (sequences times longest prompt plus ``max_tokens``) of one batch. A position
            costs ``2 * layers * key-value heads * head size`` numbers. One sequence always runs, however long.
        check_every: steps between two looks at the sampled tokens; ``None`` looks at every step on a CPU, where a look is free,
            and at every 8th on a GPU, where it waits for the device. Changes speed only.
        autocast_dtype: precision that the forward pass runs in under autocast, as in training; ``None`` is that of the weights.
            The written-out step is not made for it, so ``auto`` then calls the module.
        own_weights: sample from a copy of what is trained, renewed by :meth:`sync_weights`, so that training can go on.
        impl: how a token is computed. ``module`` calls the model; ``fused`` is the written-out step of
            :mod:`~grpo_fast.rollout.llama_step`, for Llama-shaped models; ``auto`` takes it where it fits.

    Raises:
        ValueError: an encoder-decoder, a model with recurrent layers, a size below 1, or ``fused`` for a model it does not fit.
    """

    def __init__(  # noqa: PLR0913 (options, each with a default)
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_token_ids: Sequence[int] | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        check_every: int | None = None,
        autocast_dtype: torch.dtype | None = None,
        own_weights: bool = False,
        impl: Literal["auto", "fused", "module"] = "auto",
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        foreign = foreign_parts(model.config, type(model))
        if foreign is not None:
            raise ValueError(
                f"{type(model).__name__} has {foreign}; the transformers engine runs decoders with attention layers only"
            )
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens must be at least 1, got {max_batch_tokens}")
        if check_every is not None and check_every < 1:
            raise ValueError(f"check_every must be at least 1, or None to choose by device, got {check_every}")
        self._policy = model
        self._model = _copied(model, autocast_dtype) if own_weights else model
        self._tokenizer = tokenizer
        end_tokens = end_token_ids(model, tokenizer) if eos_token_ids is None else set(eos_token_ids)
        self._max_batch_tokens = max_batch_tokens
        on_cpu = next(model.parameters()).device.type == "cpu"
        self._check_every = check_every or (1 if on_cpu else 8)
        self._context = int(getattr(config, "max_position_embeddings", 0)) or None
        self._vocabulary = int(config.vocab_size)
        self._is_end = np.isin(np.arange(self._vocabulary), sorted(end_tokens))
        self._autocast_dtype = autocast_dtype
        self._stepping = _choose_stepping(self._model, "module" if autocast_dtype is not None and impl == "auto" else impl)
        self._version = 0

    @property
    def weight_version(self) -> int:
        """Version that the last :meth:`sync_weights` announced; it is stamped on completions."""
        return self._version

    def sleep(self) -> None:
        """Does nothing: between two calls the engine holds only the trained model, or the copy that it samples from."""

    def sync_weights(self, policy: torch.nn.Module, version: int) -> dict[str, float]:
        """Records ``version``; the weights are shared, so nothing moves, or copied, where the engine has its own.

        Raises:
            ValueError: ``policy`` is neither the engine's module nor a wrapper that holds it as ``module``.
        """
        if policy is not self._policy and getattr(policy, "module", None) is not self._policy:
            raise ValueError(
                "the transformers engine samples from the module that it was built with and cannot take the weights of "
                f"another {type(policy).__name__}; build a new engine with that module"
            )
        if self._model is not self._policy:
            with torch.no_grad():
                for own, weight in zip(self._model.parameters(), self._policy.parameters(), strict=True):
                    if own is not weight:
                        own.copy_(weight)
        self._version = version
        return {}

    def close(self) -> None:
        """Does nothing: all memory of a rollout is freed when its call returns."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        num_generations: int,
        seed: int,
        first_prompt: int = 0,
        max_tokens: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Samples ``num_generations`` completions for each prompt.

        Args:
            prompts: P token-id sequences, none empty.
            sampling: how to sample. At temperature 0 log-probabilities are those of the plain softmax; otherwise those of the
                distribution sampled from, that is at the temperature and renormalised over the kept support.
            num_generations: G.
            seed: decides every random draw; no global random state is read or changed.
            first_prompt: place of the first prompt in a larger call of which this is a part.
            max_tokens: [P], longest completion of each prompt where they differ.

        Returns:
            P lists of G completions, in the order of ``prompts``. An end token is part of its completion.

        Raises:
            ValueError: no prompts, an empty prompt, a token the model does not know, or a prompt and ``max_tokens`` that
                exceed the context of the model together. Raised before anything is computed.
            FloatingPointError: the model gave logits that are not finite.
        """
        if sampling.other:
            raise ValueError(f"the transformers engine does not know {', '.join(sampling.other)}; sample with vLLM")
        limits = check_request(
            prompts,
            sampling,
            num_generations=num_generations,
            context_length=self._context,
            vocabulary=self._vocabulary,
            max_tokens=max_tokens,
        )
        answers: list[list[Completion | None]] = [[None] * num_generations for _ in prompts]
        device = next(self._model.parameters()).device.type
        precision = torch.autocast(device, dtype=self._autocast_dtype, enabled=self._autocast_dtype is not None)
        with torch.no_grad(), _evaluating(self._model), precision:
            for rows in self._batches(prompts, sampling.max_tokens, num_generations):
                transcript = self._decode(prompts, rows, sampling, seed=seed, first_prompt=first_prompt, limits=limits)
                for row, completion in zip(rows, transcript.completions(self._version), strict=True):
                    answers[row.prompt][row.generation] = completion
        return [[completion for completion in group if completion is not None] for group in answers]

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        rows: list[_Row],
        sampling: SamplingParams,
        *,
        seed: int,
        first_prompt: int,
        limits: Sequence[int],
    ) -> Transcript:
        """Samples one batch of rows, which are grouped by prompt."""
        positions = list(dict.fromkeys(row.prompt for row in rows))
        number = {position: index for index, position in enumerate(positions)}
        places = [first_prompt + row.prompt for row in rows]
        lengths = np.array([limits[row.prompt] for row in rows])
        batch = DecodeBatch(
            self._model,
            [prompts[position] for position in positions],
            Rows(
                source=np.array([number[row.prompt] for row in rows]),
                limits=lengths,
                draws=uniforms(seed, places, [row.generation for row in rows], sampling.max_tokens),
            ),
            sampling=sampling,
            stepping=self._stepping,
        )
        transcript = Transcript(lengths, sampling, is_end=self._is_end, tokenizer=self._tokenizer)
        batch.run(transcript, self._check_every)
        return transcript

    def _batches(self, prompts: Sequence[Sequence[int]], max_tokens: int, num_generations: int) -> Iterator[list[_Row]]:
        """Cuts all sequences, longest prompt first, into batches within the token budget."""
        order = sorted(range(len(prompts)), key=lambda position: (-len(prompts[position]), position))
        rows = [_Row(position, generation) for position in order for generation in range(num_generations)]
        while rows:
            width = len(prompts[rows[0].prompt]) + max_tokens
            count = max(1, self._max_batch_tokens // width)
            yield rows[:count]
            rows = rows[count:]


def foreign_parts(config: PreTrainedConfig, kind: type[PreTrainedModel] | None = None) -> str | None:
    """The parts of a model that the engine cannot run, in words; ``None`` if it runs all of them.

    Args:
        config: the model's.
        kind: its class; ``None`` takes the one that transformers has for ``config``, if any.
    """
    layer_types = getattr(config.get_text_config(decoder=True), "layer_types", None) or []
    foreign = sorted(set(layer_types) - _ATTENTION_LAYERS)
    if foreign:
        return f"layers of type {', '.join(foreign)}"
    if config.is_encoder_decoder:
        return "an encoder"
    known: Any = kind or MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "a running state in place of keys and values" if getattr(known, "_is_stateful", False) else None


def _choose_stepping(model: PreTrainedModel, impl: Literal["auto", "fused", "module"]) -> Stepping:
    """The one of four ways to step that fits ``model``.

    A finished mask saves building one a step, but would replace the window that windowed layers apply themselves.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or [])
    windowed = kinds - {"full_attention"} or getattr(config, "sliding_window", None) is not None
    plain = bool(windowed) or config._attn_implementation.removeprefix("packed_") not in {"sdpa", "eager"}
    if impl != "module" and not plain and supports(model):
        weight = next(model.parameters())
        return "shared" if weight.device.type == "cpu" and weight.dtype == torch.float32 else "fused"
    if impl == "fused":
        raise ValueError(
            f"impl='fused' does not support this {type(model).__name__}: it runs Llama, Mistral, Qwen2 and Qwen3 models with "
            "full attention (sdpa or eager) and plain linear layers; use impl='auto'"
        )
    return "plain" if plain else "masked"


def _copied(model: PreTrainedModel, autocast_dtype: torch.dtype | None) -> PreTrainedModel:
    """A copy of the model in which trained weights are copied and all others shared.

    Weights of linear layers are of the type that autocast would round them to: it remembers what it has rounded of weights that
    are trained alone, and would round these anew at every token.
    """
    frozen = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}  # they never change: shared
    copied = copy.deepcopy(model, frozen).requires_grad_(False)
    if autocast_dtype is None:
        return copied
    as_they_are = frozen.keys() | {id(module.weight) for module in copied.modules() if isinstance(module, torch.nn.Embedding)}
    rounded: dict[torch.Tensor, torch.nn.Parameter] = {}  # layers that share a weight share what it becomes
    for module in copied.modules():
        if isinstance(module, torch.nn.Linear) and id(module.weight) not in as_they_are:
            weight = module.weight
            module.weight = rounded.setdefault(weight, torch.nn.Parameter(weight.to(autocast_dtype), requires_grad=False))
    return copied


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Puts every module in evaluation mode, and each back in its own mode, come what may."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
