"""Finds calls of tools in the policy's text.

How a model calls tools is up to its chat template. If the tokeniser says how to read them, by a ``response_template``,
transformers reads them; else they are read in the forms that most models have: between ``<tool_call>`` and ``</tool_call>``
JSON (Hermes, Qwen up to 3) or a function with its parameters (Qwen 3.5, Nemotron 3). A template is tried before anything is
sampled: what it writes of a call has to be found again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grpo_fast.config import ConfigError
from grpo_fast.tasks.prompts import with_tools
from grpo_fast.tasks.replies import Replies, num_shared

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from grpo_fast.types import Message

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_PYTHON = {"True": True, "False": False, "None": None}
_THINK, _THOUGHT = "<think>", "</think>"
_MAX_LEVELS = 64
"""Of arguments: what is sent to reward functions and written to checkpoints has to be of few."""
_TAIL_TOKENS = 16
"""Tokens before an answer that are searched for the opening of a thought."""


def _no_json(value: str) -> Any:
    raise ValueError(f"{value} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_json)


def read_calls(text: str, tools: Sequence[Mapping[str, Any]] = ()) -> tuple[str, list[dict[str, Any]]]:
    """Calls between tags, as JSON, ``{"name": ..., "arguments": {...}}``, or as ``<function=...><parameter=...>``.

    Args:
        text: what the policy said, thoughts left out.
        tools: JSON schemas, which tell the types of parameters.

    Returns:
        What stands around the calls, and the calls, as :data:`~grpo_fast.types.Message` has them.

    Raises:
        ValueError, TypeError: one is broken, and none is to be made.
    """
    around, calls, rest = [], [], text
    while _OPEN in rest:
        before, _, rest = rest.partition(_OPEN)
        rest = rest.lstrip()
        marked = _FUNCTION.match(rest)
        if marked is not None:
            function, end = _function(marked[1], marked[2], tools), marked.end()
        else:
            function, end = _json(rest)
        rest = rest[end:].lstrip()
        if not rest.startswith(_CLOSE):
            raise ValueError(f"no {_CLOSE} behind a call")
        around.append(before)
        calls.append({"type": "function", "function": function})
        rest = rest.removeprefix(_CLOSE)
    return "".join([*around, rest]), _checked(calls)


def _json(text: str) -> tuple[Any, int]:
    """The JSON value at the beginning of a text, and where it ends; a tag inside a string is part of it."""
    try:
        return _DECODER.raw_decode(text)
    except RecursionError:
        raise ValueError("JSON of too many levels") from None


def _function(name: str, body: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    declared = [tool["function"]["parameters"]["properties"] for tool in tools if tool["function"]["name"] == name]
    types = {key: schema.get("type") for properties in declared for key, schema in properties.items()}
    return {"name": name, "arguments": {key: _typed(raw, types.get(key, "string")) for key, raw in _PARAMETER.findall(body)}}


def _typed(raw: str, kind: Any) -> Any:
    """A parameter's value, which is written bare: text stays text, all else is read as JSON or Python writes it."""
    if kind == "string":
        return raw
    try:
        return _PYTHON[raw] if raw in _PYTHON else _DECODER.decode(raw)
    except (ValueError, RecursionError):
        return raw


def _checked(calls: Any) -> list[dict[str, Any]]:
    """Calls as tools are called: by a name, and arguments that may be left out.

    Raises:
        TypeError: they are of another form.
        ValueError: arguments lie in each other too deep.
    """
    checked = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise TypeError(f"{call!r:.80} is no call of a tool")
        arguments = {} if function.get("arguments") is None else function["arguments"]
        if not _is_flat(arguments):
            raise ValueError(f"arguments of more than {_MAX_LEVELS} levels")
        checked.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return checked


def _is_flat(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_LEVELS):
        nested = [each for each in level if isinstance(each, Mapping | list)]
        level = [inner for each in nested for inner in (each.values() if isinstance(each, Mapping) else each)]
    return not level


class ToolReplies(Replies):
    """Tokenises what tools say, and reads what the policy says to them.

    Args:
        tokenizer: the model's.
        chat_template_kwargs: variables of the chat template, as prompts have them.
        tools: JSON schemas, at least one.

    Raises:
        ConfigError: the chat template tells nothing of tools, their calls or what they answered, or writes calls in a form that
            is not read here.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: Mapping[str, Any],
        tools: Sequence[dict[str, Any]],
    ) -> None:
        super().__init__(tokenizer, with_tools(chat_template_kwargs, tools))
        self._tools: list[Any] = list(tools)
        self._has_form = getattr(tokenizer, "response_template", None) is not None
        self._check()

    def said(self, token_ids: Sequence[int], *, context: Sequence[int]) -> Message:
        """The policy's turn as a message, calls in ``tool_calls``; if a call is broken, all of it in ``content``, as in TRL.

        Args:
            token_ids: that it sampled.
            context: tokens before them.
        """
        try:
            if self._has_form:
                return self._parsed(list(token_ids), list(context))
            message = self._read(self._text(token_ids), self._text(context[-_TAIL_TOKENS:]))
        except Exception:  # whatever a parser, which may be a model's own, makes of what a policy may say
            return super().said(token_ids, context=context)
        return message if "tool_calls" in message else super().said(token_ids, context=context)

    def heard(self, message: Message) -> Message:
        """The whole message, with the calls."""
        return message

    def _parsed(self, said: Any, before: Any) -> Message:
        """Parses tokens or text by transformers."""
        found = self._tokenizer.parse_response(said, prefix=before, tools=self._tools)
        message = {"role": "assistant", **found, "content": found.get("content") or ""}
        if found.get("tool_calls"):
            message["tool_calls"] = _checked(found["tool_calls"])
        return message

    def _read(self, text: str, before: str) -> Message:
        thought, ended, answer = text.rpartition(_THOUGHT)
        if not ended and _THINK in (text.lstrip()[: len(_THINK)], before.rstrip()[-len(_THINK) :]):
            return {"role": "assistant", "content": text}  # still thinking
        around, calls = read_calls(answer, self._tools)
        for token in self._tokenizer.all_special_tokens:
            around = around.replace(str(token), "")
        message = {"role": "assistant", "content": f"{thought}{ended}{around}".strip()}
        return message | {"tool_calls": calls} if calls else message

    def _text(self, token_ids: Sequence[int]) -> str:
        """Text with special tokens: in some tokenisers the tags are such."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _check(self) -> None:
        """Has a call and its answer rendered, and read again."""
        if self._tokenizer.chat_template is None:
            raise ConfigError("the model's tokeniser has no chat template, which tells of tools; take a model tuned for chat")
        names, answer = [tool["function"]["name"] for tool in self._tools], "what the tool answered"
        call = {"name": names[0], "arguments": {"argument": "a value"}}
        asked = {"role": "user", "content": "a question"}
        calling = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
        told = {"role": "tool", "name": names[0], "content": answer}
        try:
            before = self._template([asked], add_generation_prompt=True)
            said = self._template([asked, calling])
        except Exception as error:  # templates are programs that come with models
            raise ConfigError(f"the model's chat template refuses a conversation with tools: {error}; {_FIX}") from error
        untold = self._template([asked], add_generation_prompt=True, tools=None)
        missing = [name for name in names if before.count(name) <= untold.count(name)]
        if missing:
            raise ConfigError(f"the model's chat template tells nothing of the tool {missing[0]!r}; {_FIX}")
        if answer not in self._rendered([told]):
            raise ConfigError(f"the model's chat template leaves out what a tool answers; {_FIX}")
        written = said[num_shared([before, said]) :]
        try:
            read = self._parsed(written, before) if self._has_form else self._read(written, "")
        except Exception as error:
            raise ConfigError(_unread(written) + f" ({error})") from error
        if [each["function"] for each in read.get("tool_calls", ())] != [call]:
            raise ConfigError(_unread(written))

    def _template(self, messages: list[Message], **variables: Any) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **{**self._variables, **variables}))


_FIX = "take a model that was taught to use tools, or one's chat template that knows them"


def _unread(written: str) -> str:
    return (
        f"the model's chat template writes a call of a tool as {written!r:.200}, which is not found again; read are JSON or a "
        f"function between {_OPEN} and {_CLOSE}, and what the tokeniser's response_template describes (in "
        "tokenizer_config.json, for transformers 5.15 or later)"
    )
