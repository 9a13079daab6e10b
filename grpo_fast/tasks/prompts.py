"""From a task's rows to prompts the model reads: chat template, tokens, and the length limit.

A prompt that is messages gets the tokeniser's chat template, ready for the assistant to answer (or to go on, where the last
message is the assistant's). A prompt that is a string stays plain text, tokenised as the tokeniser does by default, with a
beginning-of-sequence token where it puts one but never with an end token. A ``system_prompt`` makes every prompt messages.

Where a prompt ends in a ``<think>`` of its own, that is told with it: completions then begin inside the thought.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeGuard

from jinja2 import Environment

from grpo_fast.config import ConfigError
from grpo_fast.tasks.encoded import EncodedPrompts
from grpo_fast.tasks.task import Rows, is_table
from grpo_fast.types import Message, PromptText, is_message

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_CHUNK_ROWS = 2048
_PROGRESS_ROWS = 20_000
_SHOWN_CHARACTERS = 60
_OPENING = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
_OPENING_CHARACTERS = 64
_FOR_TEMPLATES = {"tools", "documents"}
"""Arguments of ``apply_chat_template`` that are the template's own."""


class _Read(NamedTuple):
    """A prompt as the model reads it."""

    text: str
    token_ids: list[int]


def encode_prompts(  # noqa: PLR0913 (each a setting of its own)
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    max_prompt_length: int | None = None,
    overlong: Literal["error", "drop"] = "error",
    numbers: Sequence[int] | None = None,
) -> EncodedPrompts:
    """Tokenises every row, in one pass.

    Args:
        rows: each with a ``prompt``: a string or chat messages. May be empty; kept, as prompts are read from there again.
        tokenizer: the model's.
        system_prompt: put before every prompt as a system message, in place of one that the prompt has.
        chat_template_kwargs: variables of the chat template, such as ``{"enable_thinking": False}``.
        tools: JSON schemas of tools, which the template tells the model of.
        max_prompt_length: longest prompt, in tokens; ``None`` for no limit.
        overlong: refuse a longer one, or leave it out and log how many were.
        numbers: those by which errors name the rows, where they were taken from a greater table.

    Returns:
        Prompts in the rows' order; ``index`` is the row, ``columns`` holds all other columns.

    Raises:
        ConfigError: a prompt that is missing, empty, neither a string nor messages, or too long; messages for a tokeniser
            without a chat template; variables that it does not read, or with no prompt to apply it to; tools for a prompt of
            plain text; no prompt left.
    """
    if chat_template_kwargs:
        _check_variables(chat_template_kwargs, tokenizer)
    variables = with_tools(chat_template_kwargs or {}, tools)
    ask = functools.partial(_asked, system_prompt=system_prompt)
    prompts = EncodedPrompts(rows, ask)
    num_dropped = 0
    named = range(len(rows)) if numbers is None else numbers
    columns = rows.column_names if _in_batches(rows) else None
    for chunk in _chunks(rows):
        asked = [ask(row, named[index]) for index, row in chunk]
        read = _read(asked, tokenizer, variables, numbers=[named[index] for index, _ in chunk])
        for (index, row), prompt, (text, ids) in zip(chunk, asked, read, strict=True):
            if tools and isinstance(prompt, str):
                raise ConfigError(
                    f"the prompt of row {named[index]} is plain text, and tools are told of by the chat template, which is for "
                    "messages; give prompts as messages, or set system_prompt"
                )
            if not ids or not text:
                raise ConfigError(f"the prompt of row {named[index]} is empty; leave the row out")
            if max_prompt_length is not None and len(ids) > max_prompt_length:
                if overlong == "error":
                    raise ConfigError(
                        f"the prompt of row {named[index]} has {len(ids)} tokens, more than "
                        f"max_prompt_length={max_prompt_length} ({_shown(prompt)}); raise the limit, or set "
                        "overlong_prompts='drop' to leave such rows out"
                    )
                num_dropped += 1
                continue
            opening = _OPENING.search(text[-_OPENING_CHARACTERS:])
            prompts.add(index, columns or row, prompt, ids, opening=opening.group() if opening else "")
    if chat_template_kwargs and prompts and prompts.num_plain == len(prompts):
        raise ConfigError(
            f"chat_template_kwargs={dict(chat_template_kwargs)} changes nothing: all prompts are plain text, to which no chat "
            "template is applied; give prompts as messages or set system_prompt, or leave it out"
        )
    if num_dropped:
        if not prompts:
            raise ConfigError(
                f"all {num_dropped} prompts have more than max_prompt_length={max_prompt_length} tokens; raise it"
            )
        _log.warning("%d of %d prompts have more than %d tokens and are left out", num_dropped, len(rows), max_prompt_length)
    return prompts


def with_tools(variables: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Variables of the chat template, the tools among them where there are any.

    Raises:
        ConfigError: the variables bring tools of their own along.
    """
    if tools and "tools" in variables:
        raise ConfigError(
            "chat_template_kwargs: 'tools' are those that a run has by tools or environment_factory; leave it out"
        )
    return {**variables, "tools": list(tools)} if tools else variables


def _chunks(rows: Rows) -> Iterator[list[tuple[int, Mapping[str, Any]]]]:
    total = len(rows)
    source: Iterable[Mapping[str, Any]]
    if _in_batches(rows):
        source = _prompts_alone(rows)
    else:
        source = rows if isinstance(rows, Iterable) else (rows[index] for index in range(total))
    chunk: list[tuple[int, Mapping[str, Any]]] = []
    for numbered in enumerate(_tracked(source, total)):
        chunk.append(numbered)
        if len(chunk) == _CHUNK_ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _in_batches(rows: Rows) -> TypeGuard[Dataset]:
    """Whether rows are a plain table's, whose columns can be read apart, not those of one that makes its rows or hides some."""
    if not is_table(rows) or rows.format["type"] is not None or rows.format["columns"] != rows.column_names:
        return False
    return "prompt" in rows.column_names


def _prompts_alone(rows: Dataset) -> Iterator[Mapping[str, Any]]:
    """Rows of a table without their other columns, of which an image would be decoded; batches are read five times as fast."""
    for batch in rows.select_columns(["prompt"]).iter(_CHUNK_ROWS):
        for prompt in batch["prompt"]:
            yield {"prompt": prompt}


def _tracked(source: Iterable[Mapping[str, Any]], total: int) -> Iterable[Mapping[str, Any]]:
    if total < _PROGRESS_ROWS:
        return source
    from rich.console import Console  # noqa: PLC0415 (most runs need no bar)
    from rich.progress import track  # noqa: PLC0415 (as above)

    return track(source, "tokenising prompts", total=total, console=Console(stderr=True), transient=True)


def _asked(row: Mapping[str, Any], index: int, *, system_prompt: str | None) -> PromptText:
    """The row's prompt, checked, with the system prompt."""
    if "prompt" not in row:
        raise ConfigError(f"row {index} has no 'prompt'; it has {', '.join(row) or 'nothing'}")
    prompt = row["prompt"]
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
        return prompt if system_prompt is None else [_system(system_prompt), *messages]
    messages = _messages(prompt, index=index)
    if system_prompt is None:
        return messages
    return [_system(system_prompt), *messages[messages[0]["role"] == "system" :]]


def _system(content: str) -> Message:
    return {"role": "system", "content": content}


def _messages(prompt: Any, *, index: int) -> list[Message]:
    """Messages without the nulls that tables put where rows differ in keys, which chat templates would trip over."""
    fix = "a prompt is a string or a list of messages like {'role': 'user', 'content': '...'}"
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes) or not prompt:
        raise ConfigError(f"the prompt of row {index} is {_shown(prompt)}; {fix}")
    messages = []
    for message in prompt:
        if not is_message(message):
            raise ConfigError(f"the prompt of row {index} holds {_shown(message)}, which is no message; {fix}")
        for part in message["content"] if isinstance(message["content"], list | tuple) else ():
            if isinstance(part, Mapping) and part.get("type") not in (None, "text"):
                raise ConfigError(
                    f"the prompt of row {index} holds content of the type {part['type']!r}, but only text can be trained on "
                    "here; leave such parts, or such rows, out"
                )
        messages.append({key: value for key, value in message.items() if value is not None or key == "content"})
    return messages


def _check_variables(given: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks names against the chat template, which ignores those that it does not know."""
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"chat_template_kwargs={dict(given)}, but the model's tokeniser has no chat template; leave it out, or take a "
            "model tuned for chat"
        )
    ours = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters} - _FOR_TEMPLATES
    template = tokenizer.get_chat_template(tools=given.get("tools"))
    read = {text for _, kind, text in Environment(autoescape=True).lex(template) if kind == "name"} - ours
    for name in given:
        if name in ours:
            raise ConfigError(f"chat_template_kwargs: {name!r} is set by the trainer; leave it out")
        if name not in read:
            near = difflib.get_close_matches(name, read, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"chat_template_kwargs: the model's chat template has no variable {name!r}{hint}")


def _read(
    prompts: Sequence[PromptText],
    tokenizer: PreTrainedTokenizerBase,
    variables: Mapping[str, Any],
    *,
    numbers: Sequence[int],
) -> list[_Read]:
    """Text and tokens of each prompt as the model reads it; ``numbers`` are those of their rows."""
    plain = {place: prompt for place, prompt in enumerate(prompts) if isinstance(prompt, str)}
    texts = {
        place: rendered(prompt, tokenizer, variables, index=numbers[place])
        for place, prompt in enumerate(prompts)
        if not isinstance(prompt, str)
    }
    ids = dict(zip(plain, _plain_ids(list(plain.values()), tokenizer), strict=True))
    ids |= zip(texts, _encoded(list(texts.values()), tokenizer, special=False), strict=True)
    texts |= plain
    return [_Read(texts[place], ids[place]) for place in range(len(prompts))]


def rendered(messages: list[Message], tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any], *, index: int) -> str:
    """A prompt of messages as the model reads it.

    Args:
        messages: the prompt.
        tokenizer: has the chat template.
        variables: of the template.
        index: row of the dataset, for errors.

    Raises:
        ConfigError: there is no chat template, or it refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"the prompt of row {index} is chat messages (or system_prompt is set), but the model's tokeniser has no chat "
            "template; give prompts as plain strings without a system_prompt, or take a model tuned for chat"
        )
    prefill = messages[-1]["role"] == "assistant"
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not prefill, continue_final_message=prefill, **variables
            )
        )
    except Exception as error:  # templates are programs that come with models
        raise ConfigError(
            f"the model's chat template refuses the prompt of row {index} ({_shown(messages)}): {error}"
        ) from error


def _plain_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    ids = _encoded(texts, tokenizer, special=True)
    suffix = _suffix_length(tokenizer)
    if suffix:
        ids = [found[:-suffix] for found in ids]
    bos = tokenizer.bos_token_id
    for place, text in enumerate(texts):
        # A text that already begins with the token, as one rendered by a chat template does, would have it twice.
        if bos is not None and ids[place][:2] == [bos, bos] and text.startswith(str(tokenizer.bos_token)):
            del ids[place][0]
    return ids


def _suffix_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens that the tokeniser puts after a text."""
    bare, full = _encoded(["a"], tokenizer, special=False)[0], _encoded(["a"], tokenizer, special=True)[0]
    for start in range(len(full) - len(bare) + 1):
        if bare and full[start : start + len(bare)] == bare:
            return len(full) - start - len(bare)
    return 0


def _encoded(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    # `verbose` would warn of texts beyond the tokeniser's own limit; ours is checked above, by row.
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=special, padding=False, truncation=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    return ids


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
