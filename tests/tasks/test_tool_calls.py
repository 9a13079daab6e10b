from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from grpo_fast.config import ConfigError
from grpo_fast.tasks.prompts import encode_prompts
from grpo_fast.tasks.replies import Replies
from grpo_fast.tasks.tool_calls import ToolReplies, read_calls
from grpo_fast.tools import find_tools, schemas_of
from tests.test_tools import add, look_up
from tests.tool_chat import TEMPLATE, byte_tokenizer

SCHEMAS = schemas_of(find_tools([add, look_up]))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def functions(calls: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    assert all(call["type"] == "function" for call in calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def test_calls_are_found_between_their_tags() -> None:
    arguments = '{"style": {"line": {"w": [1, {}]}}, "title": "}{ </tool_call> é 𝄞"}'
    nested = f'<tool_call>\n{{"name": "plot", "arguments": {arguments}}}\n</tool_call>'
    around, calls = read_calls(f'First.\n{nested}\n<tool_call>{{"name": "stop"}}</tool_call> Done.')
    assert around == "First.\n\n Done."
    assert functions(calls) == [
        ("plot", {"style": {"line": {"w": [1, {}]}}, "title": "}{ </tool_call> é 𝄞"}),
        ("stop", {}),
    ]
    deep = "[" * 63 + "]" * 63
    assert functions(read_calls(f'<tool_call>{{"name": "f", "arguments": {{"a": {deep}}}}}</tool_call>')[1])[0][0] == "f"
    assert read_calls("no call at all") == ("no call at all", [])


def test_calls_may_be_functions_with_parameters() -> None:
    text = (
        "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n<parameter=b>\nNone\n</parameter>\n</function>\n</tool_call>"
        "<tool_call>\n<function=look_up>\n<parameter=word>\n42\nlines\n</parameter>\n</function>\n</tool_call>"
        "<tool_call><function=stop></function></tool_call>"
    )
    _, calls = read_calls(text, SCHEMAS)
    assert functions(calls) == [("add", {"a": 2, "b": None}), ("look_up", {"word": "42\nlines"}), ("stop", {})]
    _, calls = read_calls("<tool_call><function=add><parameter=a>two</parameter></function></tool_call>", SCHEMAS)
    assert functions(calls) == [("add", {"a": "two"})], "that it is no number, the tool will say"


@pytest.mark.parametrize(
    "broken",
    [
        '{"name": "add", "arguments": {"a": 1}',
        '{"name": "add", "arguments": {"a": 1}} and more',
        "{'name': 'add'}",
        '{"arguments": {}}',
        '{"name": 3}',
        '["add"]',
        '{"name": "add", "arguments": {"a": NaN}}',
        "[" * 20_000,
        '{"name": "add", "arguments": {"a": ' + "[" * 64 + "]" * 64 + "}}",
        "<function=add>",
        "",
    ],
)
def test_a_broken_call_is_none_and_takes_the_others_with_it(broken: str, tokenizer: PreTrainedTokenizerFast) -> None:
    text = f'<tool_call>{{"name": "add", "arguments": {{"a": 1}}}}</tool_call><tool_call>{broken}</tool_call>'
    with pytest.raises((ValueError, TypeError)):
        read_calls(text)
    ids = tokenizer(text + "<|im_end|>")["input_ids"]
    assert ToolReplies(tokenizer, {}, SCHEMAS).said(ids, context=[]) == {"role": "assistant", "content": text}


def test_what_the_policy_said_becomes_a_message_with_its_calls(tokenizer: PreTrainedTokenizerFast) -> None:
    replies = ToolReplies(tokenizer, {}, SCHEMAS)
    call = '<tool_call>\n{"name": "look_up", "arguments": {"word": "thé"}}\n</tool_call>'

    def said(text: str, before: str = "<|im_start|>assistant\n") -> dict[str, Any]:
        return replies.said(tokenizer(text)["input_ids"], context=tokenizer(before)["input_ids"])

    wanted = [{"type": "function", "function": {"name": "look_up", "arguments": {"word": "thé"}}}]
    assert said(f"Let me see.\n{call}<|im_end|>") == {"role": "assistant", "content": "Let me see.", "tool_calls": wanted}
    thought = f"<think>\nShould I {call}?\n</think>\n\n{call}<|im_end|>"
    assert said(thought)["tool_calls"] == wanted
    assert said(thought)["content"] == f"<think>\nShould I {call}?\n</think>"
    assert "tool_calls" not in said(f"<think>\nShould I {call}")
    assert "tool_calls" not in said(f"Should I {call}", "<|im_start|>assistant\n<think>\n"), "the prompt began the thought"
    assert said("It is a drink.<|im_end|>") == {"role": "assistant", "content": "It is a drink."}
    assert replies.heard(said("It is.")) == {"role": "assistant", "content": "It is."}
    assert Replies(tokenizer, {}).heard(said("It is.")) == "It is."


def test_a_tokeniser_that_says_how_calls_are_read_is_followed(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATE.replace("<tool_call>\n{", "[CALL]{").replace("}\n</tool_call>", "}[/CALL]")
    with pytest.raises(ConfigError, match=r"writes a call of a tool as '\[CALL\]\{.*which is not found again"):
        ToolReplies(tokenizer, {}, SCHEMAS)
    tokenizer.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "tool_calls": {
                "open": "[CALL]",
                "close": "[/CALL]",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close": "<|im_end|>", "content": "text"},
        },
    }
    replies = ToolReplies(tokenizer, {}, SCHEMAS)
    context = tokenizer("<|im_start|>assistant\n")["input_ids"]
    text = 'Both: [CALL]{"name": "add", "arguments": {"a": 1}}[/CALL][CALL]{"name": "add"}[/CALL]<|im_end|>'
    found = replies.said(tokenizer(text)["input_ids"], context=context)
    assert functions(found["tool_calls"]) == [("add", {"a": 1}), ("add", {})]
    assert found["role"] == "assistant"
    assert found["content"].strip() == "Both:"
    broken = replies.said(tokenizer("[CALL]{oh[/CALL]<|im_end|>")["input_ids"], context=context)
    assert broken == {"role": "assistant", "content": "[CALL]{oh[/CALL]"}


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (None, "has no chat template, which tells of tools; take a model tuned for chat"),
        (TEMPLATE.replace("tool | tojson", "tool.function.description"), "tells nothing of the tool 'add'"),
        (TEMPLATE.replace("{{ m.content }}\n</tool_resp", "</tool_resp"), "leaves out what a tool answers"),
        (TEMPLATE.replace("m.tool_calls or []", "[]"), "writes a call of a tool as .* which is not found again"),
        ("{{ raise_exception('roles alternate') }}", "refuses a conversation with tools: roles alternate; take a model"),
    ],
)
def test_templates_that_know_no_tools_are_refused_by_what_they_lack(
    template: str | None, told: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=told):
        ToolReplies(tokenizer, {}, SCHEMAS)


def test_tools_of_two_sources_do_not_go_together(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="chat_template_kwargs: 'tools' are those that a run has by tools"):
        ToolReplies(tokenizer, {"tools": SCHEMAS}, SCHEMAS)


def test_prompts_tell_of_the_tools(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": [{"role": "user", "content": "2 and 3?"}]}]
    [prompt] = encode_prompts(rows, tokenizer, tools=SCHEMAS)
    text = tokenizer.decode(list(prompt.token_ids))
    assert text == tokenizer.apply_chat_template(
        rows[0]["prompt"], tools=[add, look_up], tokenize=False, add_generation_prompt=True
    )
    assert '"Adds two numbers."' in text
    with pytest.raises(ConfigError, match="the prompt of row 0 is plain text, and tools are told of by the chat template"):
        encode_prompts([{"prompt": "2 and 3?"}], tokenizer, tools=SCHEMAS)


def test_a_conversation_grows_by_tokens_as_the_template_would_render_it(tokenizer: PreTrainedTokenizerFast) -> None:
    """Also where the policy did not say its words in the tokens that the tokeniser would have taken."""
    replies = ToolReplies(tokenizer, {}, SCHEMAS)
    asked = {"role": "user", "content": "42 and 0?"}
    [prompt] = encode_prompts([{"prompt": [asked]}], tokenizer, tools=SCHEMAS)
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 42, "b": 0}}\n</tool_call>'
    canonical = tokenizer(text)["input_ids"]
    a, d = (tokenizer.convert_tokens_to_ids(letter) for letter in "ad")
    merged = tokenizer.convert_tokens_to_ids("add")
    spelled = [each for token in canonical for each in ([a, d, d] if token == merged else [token])]
    assert len(spelled) == len(canonical) + 2
    sampled = [*spelled, tokenizer.eos_token_id]
    message = replies.said(sampled, context=prompt.token_ids)
    tools = [{"role": "tool", "name": "add", "content": content} for content in ("42", "ä")]
    reply = replies.token_ids(tools, last_token=sampled[-1])
    whole = tokenizer.apply_chat_template([asked, message, *tools], tools=SCHEMAS, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode([*prompt.token_ids, *sampled, *reply]) == whole
