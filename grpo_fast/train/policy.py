"""The policy: any causal language model that transformers loads, seen the way the objective needs it.

The model's body gives hidden states, the head stays a weight: log-probabilities are made by ``ops`` for scored tokens only, so
that ``[B, S, V]`` logits never exist.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_fast.config import ConfigError
from grpo_fast.ops import Layout, LMHead, token_logprob
from grpo_fast.train.adapters import Adapters
from grpo_fast.train.bars import bars_for_a_terminal, without_bars
from grpo_fast.train.batch import TrainingSequence, build_batch
from grpo_fast.train.checkpointing import CheckpointingMode, let_checkpoint
from grpo_fast.train.distributed import World
from grpo_fast.train.head_part import Head
from grpo_fast.train.offload import HostActivations
from grpo_fast.train.packed_model import let_pack, let_pad, model_inputs, takes_shared_prompts
from grpo_fast.train.stored_weights import is_hollow
from grpo_fast.train.streaming import Once
from grpo_fast.types import TokenBatch

_PROBE_TOLERANCE = 1e-3
_PROBE_TOLERANCE_BF16 = 0.2  # nats; the model rounds its logits to bfloat16, the head here does not
_PROBE_TOKENS = 24

_log = logging.getLogger(__name__)


class Scorer(Protocol):
    """A model that scores tokens."""

    def scored_hidden_states(self, batch: TokenBatch) -> torch.Tensor:
        """Hidden states [T, H] that predict the batch's targets."""
        ...

    def head(self, temperature: float) -> Head:
        """The head that turns them into logits."""
        ...

    def whole_head(self, *, trains: bool) -> contextlib.AbstractContextManager[None]:
        """Context in which the head may be read."""
        ...


class Follower(Protocol):
    """A reference policy that follows a policy, and is saved with it."""

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of it, and saves that."""
        ...

    def follow(self, step: int) -> None:
        """Moves after a step, if that is due."""
        ...

    def save(self, directory: Path) -> None:
        """Writes its weights."""
        ...

    def load(self, directory: Path) -> None:
        """Takes over saved weights, bit for bit."""
        ...


class Policy:
    """A causal language model with its tokenizer.

    Weights that are trained are held in float32, unless the configuration says otherwise; on a GPU forward passes run in
    bfloat16 under autocast, products of the head too, so that updates smaller than half a bfloat16 ulp (most, at learning rates
    of RL) are not lost. With ``adapters`` only those are trained and saved; they are layers inside ``model``, which otherwise
    stays what it is. ``padding_free`` packs micro-batches into one row; ``None`` does so if the model supports it. The model is
    tried out at once, or, if its weights are still to come (:func:`~.stored_weights.is_hollow`), by :meth:`try_out`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        autocast_dtype: torch.dtype | None = None,
        checkpointing: CheckpointingMode | None = None,
        adapters: Adapters | None = None,
        padding_free: bool | None = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.adapters = adapters
        self.autocast_dtype = autocast_dtype
        self.follower: Follower | None = None
        """A reference policy that follows this one."""
        self._checkpointing = checkpointing is not None
        self._head = replace(_find_head(model), operand_dtype=autocast_dtype)
        self._waiting = HostActivations(self.device) if checkpointing == "offload" else None
        self._padding_free = padding_free
        self.layout: Layout = "padded"
        """Layout that micro-batches must have."""
        if not is_hollow(self._head.weight):
            self.try_out()

    def try_out(self) -> None:
        """Finds out how the model computes logits, and whether it takes packed sequences.

        Raises:
            ConfigError: its logits are not the head's, or it does not take what it must.
        """
        self._check_head()
        if self._padding_free is not False:
            self.layout = self._try_packing(required=self._padding_free is True)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._head.weight.device

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision that forward passes run in."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def head(self, temperature: float) -> Head:
        """The head at a sampling temperature; shares the model's weight."""
        return replace(self._head, temperature=temperature)

    def scored_hidden_states(self, batch: TokenBatch) -> torch.Tensor:
        """Hidden states [T, H] that predict the batch's targets; differentiable."""
        if self._checkpointing:
            let_checkpoint(self.model)
        with contextlib.nullcontext() if self._waiting is None else self._waiting.keep():
            return self._hidden_states(**model_inputs(self.model, batch)).flatten(0, 1)[batch.row_index]

    def _hidden_states(self, **inputs: Any) -> torch.Tensor:
        with self.autocast():
            output = self.model.base_model(**inputs, use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    @property
    def sums_gradients(self) -> bool:
        """Whether a backward pass leaves gradients of all ranks together, not of this one alone."""
        return False

    def whole_head(self, *, trains: bool) -> contextlib.AbstractContextManager[None]:
        """Context in which the head's weight is whole, as it always is without sharding."""
        return contextlib.nullcontext()

    def whole_model(self) -> torch.nn.Module:
        """The model with whole weights, for engines."""
        return self.model

    def reading(self, world: World) -> Once:
        """The means by which rank 0 reads :meth:`whole_model` or saves, so that ranks that hold shards take part.

        Args:
            world: the ranks; they are that means if each of them holds the whole model.
        """
        return world

    def save(self, directory: Path) -> None:
        """Writes tokenizer and model (safetensors), or the adapters alone, in the layout that ``from_pretrained`` reads."""
        self._write(directory, None)

    def _write(self, directory: Path, weights: dict[str, torch.Tensor] | None) -> None:
        """Writes ``weights`` in place of the model's own."""
        if self.adapters is not None:
            self.adapters.save(directory, weights)
        else:
            with without_bars():  # one over the files that are written would tear the live console
                self.model.save_pretrained(directory, state_dict=weights)
        self.tokenizer.save_pretrained(directory)
        for file in directory.glob("*.safetensors"):  # which only their owner may read, whatever the umask says
            usual = directory / "tokenizer_config.json"
            if file.stat().st_mode != usual.stat().st_mode:  # nor do all file systems have modes
                shutil.copymode(usual, file)

    def load_weights(self, directory: Path) -> None:
        """Takes over the weights saved in ``directory``, in place, bit for bit."""
        if self.adapters is not None:
            self.adapters.load(directory)
            return
        with bars_for_a_terminal():
            saved = type(self.model).from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            own = dict(self.model.named_parameters())
            for name, value in saved.named_parameters():
                own[name].copy_(value)

    def _model_logits(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V] as the model itself computes them."""
        with self.autocast():
            logits: torch.Tensor = self.model(**inputs, use_cache=False).logits
        return logits

    def _plain_head(self) -> LMHead:
        """The head of whole weights."""
        return self._head

    @torch.no_grad()
    def _check_head(self) -> None:
        tokens = torch.arange(min(8, self._head.weight.shape[0]), device=self.device)[None]
        mask = torch.ones_like(tokens)
        hidden = self._hidden_states(input_ids=tokens, attention_mask=mask)[0, :-1]
        logits = self._model_logits(input_ids=tokens, attention_mask=mask)[0].float()
        expected = logits.log_softmax(-1)[:-1].gather(1, tokens[0, 1:, None])[:, 0]
        found = token_logprob(hidden, self._plain_head(), targets=tokens[0, 1:], want_entropy=False)[0]
        error = (expected - found).abs().max().item()
        if not error <= (_PROBE_TOLERANCE if self.autocast_dtype is None else _PROBE_TOLERANCE_BF16):
            raise ConfigError(
                f"{type(self.model).__name__} computes logits in an unknown way (log-probabilities differ by "
                f"{error:.3g} nats from head(hidden states)); please report the model's name"
            )

    def _try_packing(self, *, required: bool) -> Layout:
        """Lets the model take packed sequences, and sees that none sees another."""
        problem = let_pack(self.model) or self._leak()
        if problem is None:
            return "packed"
        let_pad(self.model)
        if required:
            raise ConfigError(f"padding_free=True: {problem}; set padding_free=False")
        _log.info("sequences are padded rather than packed: %s", problem)
        return "padded"

    @torch.no_grad()
    def _leak(self) -> str | None:
        tokens = [number % min(8, self._head.weight.shape[0]) for number in range(_PROBE_TOKENS)]
        sequences = [
            TrainingSequence(
                (tokens[7 * (low // 7)],), tuple(tokens[low + 1 : high]), (0.0,) * (high - low - 1), 0.0, in_loss=True
            )
            for low, high in pairwise((0, 3, 7, _PROBE_TOKENS))  # the first two share their prompt
        ]
        shares = takes_shared_prompts(self.model)
        weights = [0.0] * len(sequences)
        alone = [self.scored_hidden_states(build_batch([one], [0.0], self.device)) for one in sequences]
        expected = torch.cat(alone).float()
        try:
            batch = build_batch(sequences, weights, self.device, layout="packed", shares_prompts=shares)
            found = self.scored_hidden_states(batch).float()
        except (ValueError, TypeError, RuntimeError) as error:
            return f"{type(self.model).__name__} does not support packed sequences ({error})"
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        exact = self.autocast_dtype is None
        if difference <= (_PROBE_TOLERANCE if exact else _PROBE_TOLERANCE_BF16):
            return None
        return f"{type(self.model).__name__} mixes packed sequences (hidden states differ by {difference:.1%})"


class BasePolicy:
    """A policy with its adapters as they began, off or as they were saved: the reference policy of a LoRA run.

    Its own memory is that of the saved adapters. It must be made before the first update. Not for a sharded policy that began
    from saved ones: passes leave weights gathered there, which nothing written to the shards would reach.
    """

    def __init__(self, policy: Policy, adapters: Adapters) -> None:
        self._policy = policy
        self._adapters = adapters
        self._start = adapters.copies() if adapters.begun else None

    def scored_hidden_states(self, batch: TokenBatch) -> torch.Tensor:
        """Hidden states [T, H] of the start that predict the batch's targets."""
        with self._adapters.off() if self._start is None else self._adapters.holding(self._start):
            return self._policy.scored_hidden_states(batch)

    def head(self, temperature: float) -> Head:
        """The head, which has no adapter."""
        return self._policy.head(temperature)

    def whole_head(self, *, trains: bool) -> contextlib.AbstractContextManager[None]:
        """As the policy's."""
        return self._policy.whole_head(trains=trains)


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters of a model, adapters apart; one of four bits counts as one."""
    weights = (weight for name, weight in model.named_parameters() if ".lora_" not in name)
    return sum(torch.Size((getattr(weight, "quant_state", None) or weight).shape).numel() for weight in weights)


def _find_head(model: PreTrainedModel) -> LMHead:
    linear = model.get_output_embeddings()
    if linear is None:
        raise ConfigError(f"{type(model).__name__} has no output embeddings; a causal language model is needed")
    text_config = model.config.get_text_config()
    scale = float(getattr(text_config, "logit_scale", None) or 1.0) / float(getattr(text_config, "logits_scaling", None) or 1.0)
    return LMHead(
        weight=linear.weight,
        bias=getattr(linear, "bias", None),
        logit_scale=scale,
        softcap=getattr(text_config, "final_logit_softcapping", None),
    )
