"""Tokenises an environment's messages before and between the turns of the policy, as the model reads them.

Text goes on as it is. Messages get the chat template: what it puts behind an assistant's message, the messages themselves, and
what begins the next answer. The conversation so far is never rendered again, so that what the policy sampled stays as it is,
thoughts included, which templates take out of earlier turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grpo_fast.config import ConfigError
from grpo_fast.rollout.stop_strings import decode
from grpo_fast.tasks.prompts import rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from grpo_fast.types import Message, PromptText

_LEAD = "\n"
_SAID = "what-the-policy-said-5b0c1d7e"
"""Stands for it in the conversation that is rendered; what comes behind it does not depend on it."""
_CHARACTERS = 8
"""Of a token, as a first guess."""


class Replies:
    """Tokenises replies.

    Args:
        tokenizer: the model's.
        chat_template_kwargs: variables of the chat template, as prompts have them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._variables = chat_template_kwargs

    def token_ids(self, reply: str | list[Message], *, last_token: int, room: int | None = None) -> list[int]:
        """Tokens that stand between what the policy said and what it will say.

        Args:
            reply: text, or messages.
            last_token: the last one of what it said. Where that is the end token that the template puts there, it is not
                repeated.
            room: for how many tokens there is room; of a reply that has far more, only those of its begin are made, which are
                more than that too. ``None`` for any number.

        Raises:
            ConfigError: the chat template refuses the messages.
        """
        text = reply if isinstance(reply, str) else self._rendered(reply)
        ids = self._continued(text, room=room)
        return ids[1:] if not isinstance(reply, str) and ids[:1] == [last_token] else ids

    def prompt_ids(self, messages: list[Message], *, index: int) -> tuple[int, ...]:
        """Tokens of a prompt that an environment has put something behind.

        Args:
            messages: as :meth:`observed` makes them.
            index: row of the dataset, for errors.

        Raises:
            ConfigError: the chat template refuses the messages.
        """
        text = rendered(messages, self._tokenizer, self._variables, index=index)
        return tuple(self._ids(text))

    @staticmethod
    def observed(prompt: PromptText, observation: str) -> list[Message]:
        """A prompt of messages with an observation behind the last one's content."""
        assert not isinstance(prompt, str)
        content = prompt[-1]["content"]
        part = {"type": "text", "text": observation}
        put = f"{content or ''}{observation}" if isinstance(content, str | None) else [*content, part]
        return [*prompt[:-1], {**prompt[-1], "content": put}]

    def said(self, token_ids: Sequence[int], *, context: Sequence[int]) -> Message:
        """The policy's turn as a message.

        Args:
            token_ids: that it sampled.
            context: tokens before them.
        """
        del context
        return {"role": "assistant", "content": self.decode(token_ids)}

    def heard(self, message: Message) -> str | Message:
        """The part of the policy's message that its environment gets."""
        return str(message["content"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of what the policy said, without special tokens."""
        return decode(self._tokenizer, token_ids)

    def _continued(self, text: str, *, room: int | None) -> list[int]:
        """Tokens of a text that continues another: some tokenisers put a space before their input."""
        lead, whole = self._ids(_LEAD), self._ids(_LEAD + text, room=room)
        apart = whole[: len(lead)] == lead
        return whole[len(lead) :] if apart else self._ids(text, room=room)

    def _ids(self, text: str, *, room: int | None = None) -> list[int]:
        """Tokens; half characters, which sandboxes give and models ask for, are question marks, as tokenisers take none.

        A tool may return a whole book, which takes minutes: it is begun with a part.
        """
        part = len(text) if room is None else _CHARACTERS * (room + len(_LEAD))
        while True:
            begin = text[:part].encode("utf-8", "replace").decode()
            found: list[int] = self._tokenizer(begin, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
            if room is None or part >= len(text) or len(found) > 2 * (room + len(_LEAD)):
                return found
            part *= 4

    def _rendered(self, messages: list[Message]) -> str:
        said = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _SAID}]
        try:
            whole = str(
                self._tokenizer.apply_chat_template(
                    [*said, *messages], tokenize=False, add_generation_prompt=True, **self._variables
                )
            )
        except Exception as error:  # templates are programs that come with models
            raise ConfigError(
                f"the model's chat template refuses the environment's messages {messages!r:.200}: {error}"
            ) from error
        _, found, rest = whole.partition(_SAID)
        if not found:
            raise ConfigError(
                "the model's chat template drops earlier assistant turns, so an environment cannot answer them; choose a model "
                "whose template keeps them"
            )
        return rest


def num_shared(sequences: Sequence[Sequence[Any]]) -> int:
    """Length of the prefix that all of some sequences share."""
    pairs = enumerate(zip(*sequences, strict=False))
    return next((place for place, items in pairs if any(item != items[0] for item in items)), min(map(len, sequences)))
