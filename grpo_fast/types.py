"""The values that flow through a run, and the one legend of shape letters.

====== ==========================================================================
Letter Meaning
====== ==========================================================================
``P``  prompts of a step
``G``  completions per prompt (``num_generations``)
``N``  sequences of a step, ``P * G``
``B``  sequences of one micro-batch
``S``  padded length of a micro-batch, prompt and completion together
``T``  scored completion tokens, packed without padding
``H``  hidden size of the model
``V``  vocabulary size
``F``  reward functions
====== ==========================================================================

Data flows down and once: a ``Prompt`` gets G ``Completion`` values, they make a ``Group``, groups of a
step get rewards and advantages, and live groups are cut into ``TokenBatch`` micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard

if TYPE_CHECKING:
    import torch

    from grpo_fast.kept_tokens import KeptTokens
    from grpo_fast.ops.kept_logprob import Kept
    from grpo_fast.ops.packed_attention import PackedLayout

FinishReason: TypeAlias = Literal["stop", "length"]
Message: TypeAlias = dict[str, Any]
"""One chat message, ``{"role": ..., "content": ...}``, as in Hugging Face chat templates."""

PromptText: TypeAlias = str | list[Message]
"""Content of a dataset's ``prompt`` column: plain text or chat messages."""


def is_message(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value can be a :data:`Message`."""
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and "content" in value


COMPLETION_COLUMNS = ("step", "prompt", "completion", "reward", "advantage")
"""Columns of the table of completions; values that reward functions log of a completion are further columns."""


class TrainingError(RuntimeError):
    """A run cannot go on; the message says why, what is safe, and what to do."""


@dataclass(frozen=True, slots=True)
class TrainerState:
    """Progress of a run, for reward functions that ask for ``trainer_state``; names as in ``transformers.TrainerState``."""

    epoch: float = 0.0
    """Passes over the prompts until then."""
    global_step: int = 0
    """Steps done: 0 while the first one is rewarded."""
    max_steps: int = 0
    """Steps at most."""
    num_train_epochs: int = 0
    """Passes that ``max_steps`` begin, without those prompts that refilling draws."""
    is_world_process_zero: bool = True
    """Whether the reward is computed for the main process."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, as the dataset gave it and as the model reads it."""

    index: int
    """Row of the dataset, which names the prompt in logs."""
    prompt: PromptText
    """The text or the messages, handed to reward functions unchanged."""
    token_ids: tuple[int, ...]
    """The tokens the model reads, chat template applied."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Every other column of the row, handed to reward functions by keyword."""
    opening: str = ""
    """Text with which it begins the answer for the model, so that completions do not contain it: ``<think>`` and what follows,
    as chat templates of reasoning models end."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What came of a call of a reward function."""

    values: list[float | None]
    """One finite number or ``None`` a completion."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """What was logged by ``log_metric``, by name."""
    extra: dict[str, list[Any]] = field(default_factory=dict)
    """What was logged by ``log_extra``, by column: a number, text, switch or ``None`` a completion."""


@dataclass(frozen=True, slots=True)
class Episode:
    """A completion in which an environment answered the policy between its turns."""

    sampled: tuple[bool, ...]
    """For each token, whether the policy sampled it. The others are the environment's: read, never trained on."""
    messages: tuple[Message, ...]
    """The conversation after a prompt of messages, for reward functions; empty after plain text."""
    num_turns: int
    """Number of the policy's turns."""
    reward: float | None = None
    """Reward by the environment's ``get_reward``, if it has one."""
    judgements: tuple[Scored, ...] = ()
    """What each of the reward functions that read environments said of this completion, for the reward pool."""
    asked: tuple[Message, ...] = ()
    """The prompt with what the environment appended; empty if it appended nothing. Its tokens beyond ``Prompt.token_ids``
    begin the completion's."""
    num_tool_calls: int | None = None
    """Calls of tools; ``None`` where there are no tools."""
    num_tool_failures: int = 0
    """Calls of tools that failed."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer. Token in, token out: it is never tokenised again."""

    token_ids: tuple[int, ...]
    """Sampled tokens, with the end-of-sequence token where the model emitted one; in an episode the environment's too."""
    logprobs: tuple[float, ...]
    """Log-probability in nats of each sampled token, at the sampling temperature, when it was sampled; 0 where it was not."""
    finish_reason: FinishReason
    """``stop``: an end token or stop string came; ``length``: cut at ``max_completion_length``."""
    text: str
    """Decoded without special tokens, for reward functions and people."""
    weight_version: int = 0
    """Version of the policy weights that sampled its first token (the step whose weights were in force)."""
    weight_versions: tuple[int, ...] = ()
    """Version of each token, where weights changed within the completion; empty where ``weight_version`` holds for all."""
    kept: KeptTokens | None = None
    """Tokens that each sampled token was drawn from, if ``top_k``, ``top_p`` or ``min_p`` restricted sampling; ``logprobs`` are
    over those."""
    episode: Episode | None = None
    """Its turns, where there is an environment."""

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled."""
        return len(self.token_ids) if self.episode is None else sum(self.episode.sampled)

    @property
    def truncated(self) -> bool:
        """Whether the length limit cut the completion."""
        return self.finish_reason == "length"


@dataclass(slots=True)
class Group:
    """A prompt, its G completions and what the reward functions said of them."""

    prompt: Prompt
    completions: list[Completion]
    rewards: list[list[float]] = field(default_factory=list)
    """[G][F]: one row a completion, one value a reward function; NaN where a function gave ``None``."""
    reward: list[float] = field(default_factory=list)
    """[G]: weighted sum over the functions; NaN where every function gave ``None``."""
    advantages: list[float] = field(default_factory=list)
    """[G]: set once the whole step is scored."""
    extra: dict[str, list[Any]] = field(default_factory=dict)
    """[G] a column: what reward functions logged of each completion, ``None`` where nothing; numbers, texts and switches."""

    def asked(self, completion: Completion) -> PromptText:
        """The prompt as one of the completions read it, with what an environment appended to it."""
        episode = completion.episode
        return list(episode.asked) if episode is not None and episode.asked else self.prompt.prompt


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One micro-batch, ready for the model: right-padded, or packed into a single row.

    Only completion tokens are scored. ``row_index`` picks, from the flattened ``[B * S]`` positions, those whose
    next token is a scored one, so that the head never sees a prompt or padding row. Packed, ``input_ids`` is [1, tokens].
    """

    input_ids: torch.Tensor
    """int64 [B, S], or [1, tokens]."""
    row_index: torch.Tensor
    """int64 [T]: flattened position whose hidden state predicts the target."""
    targets: torch.Tensor
    """int64 [T]: the sampled tokens."""
    sequence_index: torch.Tensor
    """int64 [T]: which of the B sequences a scored token belongs to, ascending."""
    advantages: torch.Tensor
    """float32 [B]."""
    loss_weights: torch.Tensor
    """float32 [B]: what the objective's normaliser multiplies each token's loss of a sequence with."""
    sampling_logprobs: torch.Tensor
    """float32 [T]: log-probabilities given by the rollout engine."""
    attention_mask: torch.Tensor | None = None
    """Padded: int64 [B, S]; 1 on real tokens."""
    position_ids: torch.Tensor | None = None
    """Packed: int64 [1, tokens]; counts from 0 in each sequence."""
    packed_layout: PackedLayout | None = None
    """Packed: where each sequence lies."""
    kept: Kept | None = None
    """Tokens that each of the T tokens was drawn from; ``None``: the whole vocabulary."""

    @property
    def num_sequences(self) -> int:
        """B."""
        return int(self.advantages.shape[0])

    @property
    def num_scored_tokens(self) -> int:
        """T."""
        return int(self.targets.shape[0])
