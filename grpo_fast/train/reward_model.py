"""Reward models: sequence classifiers of one label that rate a prompt with its completion, as TRL takes them.

They run in the trainer's process, on its device, after the completions of a step are sampled; every rank rates its own share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo_fast.config import Config, ConfigError
from grpo_fast.hub import READ_ERRORS, WHERE_MODELS_ARE, Place, why_unread
from grpo_fast.rewards import HeldHere, names_model
from grpo_fast.train.bars import bars_for_a_terminal
from grpo_fast.train.policy_source import computes_in_bfloat16, pick_device

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from grpo_fast.types import Message

_FIX = f"{WHERE_MODELS_ARE}; a function is named 'module:function'."


class RewardModel(HeldHere):
    """A reward function that is a model: its one logit is the reward of a prompt with its completion.

    Messages are written by the model's own chat template. What is read is what TRL has its reward models read.

    Args:
        model: a directory, a hub id, or a model that is loaded already and is left where it is.
        tokenizer: of the model; read from beside it unless given.
        revision: of a hub id.
        tokens_per_batch: limit of a forward pass, padding included; a longer text is a batch of its own.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
        tokens_per_batch: int = 16_384,
    ) -> None:
        self._model = model if isinstance(model, PreTrainedModel) else None
        self._name = str(model.config.name_or_path) if isinstance(model, PreTrainedModel) else str(model)
        self.__name__ = Path(self._name).name or type(model).__name__
        self._tokenizer = tokenizer
        self._revision = revision
        self._tokens_per_batch = tokens_per_batch
        self._run: Config | None = None

    def check(self, run: Config) -> Self:
        """Reads tokeniser and sizes.

        Args:
            run: the run's configuration: device, dtype, ``trust_remote_code`` and ``chat_template_kwargs`` are taken from it.

        Raises:
            ConfigError: there is no such model, or it gives another number of labels than one.
        """
        self._read_sizes(run)
        self.tokenizer: PreTrainedTokenizerBase = self._tokenizer or self._read(AutoTokenizer)
        return self

    def load(self) -> None:
        """Reads the weights.

        Raises:
            ConfigError: they cannot be read, or lack some that the model has.
        """
        if self._run is None:
            self.check(Config())
        assert self._run is not None
        if self._model is None:
            device = pick_device(self._run.device)
            model, found = self._read(
                AutoModelForSequenceClassification,
                num_labels=1,
                dtype=_dtype(self._run, device.type),
                output_loading_info=True,
            )
            missing = sorted(found["missing_keys"])
            if missing:
                raise ConfigError(
                    f"reward model {self._name!r} has no weights for {', '.join(missing[:3])}: it was not trained to rate "
                    "texts; name a sequence classifier"
                )
            self._model = model.to(device)
        self._model.eval().requires_grad_(False)

    def num_bytes(self, run: Config, kind: str) -> int:
        """Memory of the weights on a device ("cuda" or "cpu"), known before they are read.

        Raises:
            ConfigError: see :meth:`check`.
        """
        self._read_sizes(run)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(self.config, trust_remote_code=run.trust_remote_code)
        return int(model.num_parameters()) * _dtype(run, kind).itemsize

    def _read_sizes(self, run: Config) -> None:
        self._run = run
        path = Path(self._name).expanduser()
        name = str(path) if path.is_dir() else self._name
        needs_nothing = self._model is not None and self._tokenizer is not None
        self._place = Place(name) if needs_nothing else Place.of(name, self._revision)
        self._arguments = {"trust_remote_code": run.trust_remote_code, **self._place.arguments}
        self.config: PreTrainedConfig = self._read(AutoConfig) if self._model is None else self._model.config
        """Sizes and kind of the model."""
        if self.config.num_labels != 1:
            kind = ", ".join(self.config.architectures or ()) or self.config.model_type
            raise ConfigError(
                f"reward model {self._name!r} ({kind}) gives {self.config.num_labels} labels to a text, but a reward is one "
                "number; name a sequence classifier with num_labels=1"
            )

    def __call__(self, prompts: Sequence[str | list[Message]], completions: Sequence[str | list[Message]]) -> list[float]:
        """Rates completions.

        Args:
            prompts: [N] texts or conversations.
            completions: [N] what followed each.

        Returns:
            [N] logits.

        Raises:
            ValueError: a conversation and no chat template, or a text is longer than the model can read.
        """
        if self._model is None or self._run is None:
            self.load()
        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        rows: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        longest, limit = max(map(len, rows), default=0), getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise ValueError(
                f"a prompt with its completion has {longest} tokens for the reward model {self._name!r}, which reads up to "
                f"{limit}; lower max_prompt_length or max_completion_length"
            )
        rewards = [0.0] * len(rows)
        for places in self._batches(rows):
            for place, reward in zip(places, self._rated([rows[place] for place in places]), strict=True):
                rewards[place] = reward
        return rewards

    def _text(self, prompt: str | list[Message], completion: str | list[Message]) -> str:
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"the prompts are conversations, but the tokeniser of the reward model {self._name!r} has no chat "
                "template; give RewardModel a tokenizer that has one"
            )
        assert self._run is not None
        kwargs = self._run.chat_template_kwargs
        return str(self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False, **kwargs))

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Numbers of the rows that are read together: those of like lengths, the longest first."""
        batch: list[int] = []
        for place in sorted(range(len(rows)), key=lambda place: -len(rows[place])):
            if batch and len(rows[batch[0]]) * (len(batch) + 1) > self._tokens_per_batch:
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    @torch.inference_mode()
    def _rated(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Padded on the right. The models find the end of a text by what is no padding, so that no text may have that token."""
        assert self._model is not None
        padding, used = self.tokenizer.pad_token_id, {token for row in rows for token in row}
        if padding is None or padding in used:
            padding = next(token for token in count() if token not in used)
        self._model.config.get_text_config().pad_token_id = padding
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], device=self._model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self._model.device)
        logits: torch.Tensor = self._model(input_ids=ids, attention_mask=mask).logits
        return logits[:, 0].float().tolist()

    def _read(self, auto_class: Any, **arguments: Any) -> Any:
        try:
            with bars_for_a_terminal():
                return auto_class.from_pretrained(**self._arguments | arguments)
        except READ_ERRORS as error:
            raise ConfigError(
                f"cannot load reward model {self._name!r}: {why_unread(error, self._place.unreached)} {_FIX}"
            ) from error


def with_models(config: Config, reward_funcs: Sequence[str | Callable[..., Any]]) -> list[str | Callable[..., Any]]:
    """Reward functions with a :class:`RewardModel` in place of each model and each name of one, checked.

    Raises:
        ConfigError: see :meth:`RewardModel.check`.
    """
    found = [RewardModel(spec) if isinstance(spec, PreTrainedModel) or names_model(spec) else spec for spec in reward_funcs]
    return [spec.check(config) if isinstance(spec, RewardModel) else spec for spec in found]


def _dtype(run: Config, kind: str) -> torch.dtype:
    return torch.bfloat16 if computes_in_bfloat16(run, kind) else torch.float32


def reward_model_bytes(config: Config, kind: str) -> int:
    """Memory of the reward models that a configuration names, on a device ("cuda" or "cpu").

    Raises:
        ConfigError: see :meth:`RewardModel.check`.
    """
    return sum(RewardModel(spec).num_bytes(config, kind) for spec in config.reward_funcs if names_model(spec))
