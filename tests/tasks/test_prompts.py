from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from datasets import Dataset, Features, Image, Value
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from grpo_fast.assets import embedded_model_dir
from grpo_fast.config import ConfigError
from grpo_fast.tasks.prompts import encode_prompts

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m.role }}> {% if m.name is defined %}{{ m.name }} : {% endif %}{{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> "
    "{% if thinking %}<think> \n{% elif thinking is false %}<think> </think> {% endif %}{% endif %}"
)
WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "<system>",
    "<user>",
    "<assistant>",
    "hello",
    "be",
    "brief",
    "ok",
    "a",
    "none",
    ":",
    "<think>",
    "</think>",
    *map(str, range(10)),
]


def tokenizer(*, chat: bool = True, form: str = "<s> $A") -> PreTrainedTokenizerFast:
    """A word-level tokeniser; ``form`` says what goes around a text."""
    words = {word: index for index, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(token, words[token]) for token in ("<s>", "</s>")]
    core.post_processor = processors.TemplateProcessing(single=form, special_tokens=special)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = TEMPLATE if chat else None
    return fast


def words(ids: Sequence[int]) -> str:
    return " ".join(WORDS[index] for index in ids)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def encode_one(prompt: Any, **options: Any) -> Any:
    return encode_prompts([{"prompt": prompt}], options.pop("tokenizer", None) or tokenizer(), **options)[0]


def test_a_string_stays_text_even_for_a_chat_model() -> None:
    prompt = encode_one("hello 1")
    assert prompt.prompt == "hello 1"
    assert words(prompt.token_ids) == "<s> hello 1"


@pytest.mark.parametrize(
    ("form", "expected"),
    [("$A", "hello 1"), ("<s> $A </s>", "<s> hello 1"), ("$A </s>", "hello 1"), ("<s> <s> $A </s> </s>", "<s> <s> hello 1")],
)
def test_text_begins_as_the_tokeniser_does_and_has_no_end_token(form: str, expected: str) -> None:
    assert words(encode_one("hello 1", tokenizer=tokenizer(form=form)).token_ids) == expected


def test_marks_that_stand_in_the_text_are_kept_and_a_beginning_is_not_doubled() -> None:
    both = tokenizer(form="<s> $A </s>")
    assert words(encode_one("<s> hello </s>", tokenizer=both).token_ids) == "<s> hello </s>"


def test_messages_get_the_chat_template() -> None:
    messages = [user("hello 1"), {"role": "assistant", "content": "ok"}, user("2")]
    prompt = encode_one(messages)
    assert prompt.prompt == messages
    assert words(prompt.token_ids) == "<user> hello 1 </s> <assistant> ok </s> <user> 2 </s> <assistant>"
    assert list(prompt.token_ids) == tokenizer().apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_an_answer_that_was_begun_goes_on() -> None:
    prompt = encode_one([user("hello"), {"role": "assistant", "content": "ok 1"}])
    assert words(prompt.token_ids) == "<user> hello </s> <assistant> ok 1"


def test_a_system_prompt_goes_before_text_and_messages_and_replaces_the_rows_own() -> None:
    rows = [{"prompt": "hello"}, {"prompt": [user("hello")]}, {"prompt": [{"role": "system", "content": "a"}, user("hello")]}]
    prompts = encode_prompts(rows, tokenizer(), system_prompt="be brief")
    for prompt in prompts:
        assert prompt.prompt == [{"role": "system", "content": "be brief"}, user("hello")]
        assert words(prompt.token_ids) == "<system> be brief </s> <user> hello </s> <assistant>"


@pytest.mark.parametrize(
    ("thinking", "opening", "end"),
    [(None, "", ""), (True, "<think> \n", " <think>"), (False, "<think> </think> ", " <think> </think>")],
)
def test_variables_reach_the_chat_template(thinking: bool | None, opening: str, end: str) -> None:
    variables = {} if thinking is None else {"thinking": thinking}
    prompt = encode_one([user("hello")], chat_template_kwargs=variables)
    assert words(prompt.token_ids) == "<user> hello </s> <assistant>" + end
    assert prompt.opening == opening


@pytest.mark.parametrize(
    ("prompt", "opening"),
    [
        ("hello <think>", "<think>"),
        ("<think> hello </think>", ""),
        ([user("hello <think>")], ""),
        ([user("hello"), {"role": "assistant", "content": "ok <think>\n"}], "<think>\n"),
        ([user("hello"), {"role": "assistant", "content": "<think> ok"}], ""),
    ],
)
def test_a_thought_that_the_prompt_opens_is_told(prompt: Any, opening: str) -> None:
    assert encode_one(prompt, tokenizer=tokenizer(form="$A")).opening == opening


@pytest.mark.parametrize(
    ("given", "chat", "prompt", "message"),
    [
        ({"thinkin": True}, True, [user("hello")], r"has no variable 'thinkin'; did you mean 'thinking'\?"),
        ({"zzz": True}, True, [user("hello")], r"has no variable 'zzz'$"),
        ({"add_generation_prompt": False}, True, [user("hello")], r"'add_generation_prompt' is set by the trainer"),
        ({"messages": []}, True, [user("hello")], r"'messages' is set by the trainer"),
        ({"thinking": True}, False, "hello", r"tokeniser has no chat template; leave it out"),
        ({"thinking": True}, True, "hello", r"changes nothing: all prompts are plain text"),
    ],
)
def test_variables_that_would_do_nothing_are_refused(given: dict[str, Any], chat: bool, prompt: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=r"chat_template_kwargs.*" + message):
        encode_one(prompt, tokenizer=tokenizer(chat=chat), chat_template_kwargs=given)


def test_tools_are_a_variable_of_templates_that_read_them() -> None:
    speaker = tokenizer()
    speaker.chat_template = "{% for tool in tools %}{{ tool.name }} {% endfor %}" + TEMPLATE
    prompt = encode_one([user("hello")], tokenizer=speaker, chat_template_kwargs={"tools": [{"name": "none"}]})
    assert words(prompt.token_ids) == "none <user> hello </s> <assistant>"


@pytest.mark.parametrize(("prompt", "system_prompt"), [([user("hello")], None), ("hello", "be brief")])
def test_messages_need_a_chat_template(prompt: Any, system_prompt: str | None) -> None:
    with pytest.raises(ConfigError, match=r"row 0 is chat messages .* no chat template; give prompts as plain strings"):
        encode_one(prompt, tokenizer=tokenizer(chat=False), system_prompt=system_prompt)


def test_what_the_template_refuses_names_the_row() -> None:
    with pytest.raises(ConfigError, match=r"template refuses the prompt of row 1 .*no such role"):
        encode_prompts([{"prompt": "a"}, {"prompt": [{"role": "bad", "content": "a"}]}], tokenizer())
    with pytest.raises(ConfigError, match=r"template refuses the prompt of row 70 "):
        encode_prompts([{"prompt": "a"}, {"prompt": [{"role": "bad", "content": "a"}]}], tokenizer(), numbers=[7, 70])


@pytest.mark.parametrize("prompt", [None, 3, [], b"hello", {"role": "user", "content": "a"}, {}])
def test_a_prompt_is_text_or_messages(prompt: Any) -> None:
    with pytest.raises(ConfigError, match=r"the prompt of row 0 is .*a prompt is a string or a list of messages"):
        encode_one(prompt)


def test_parts_of_a_message_are_text() -> None:
    parts: list[Any] = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    with pytest.raises(ConfigError, match="row 0 holds content of the type 'image', but only text can be trained on"):
        encode_one([{"role": "user", "content": parts}])


@pytest.mark.parametrize("message", ["hello", {"role": "user"}, {"content": "a"}, {"role": 1, "content": "a"}])
def test_a_message_has_role_and_content(message: Any) -> None:
    with pytest.raises(ConfigError, match=r"row 0 holds .* which is no message"):
        encode_one([message])


def test_missing_and_empty_prompts_name_the_row() -> None:
    with pytest.raises(ConfigError, match=r"row 1 has no 'prompt'; it has text"):
        encode_prompts([{"prompt": "a"}, {"text": "a"}], tokenizer())
    with pytest.raises(ConfigError, match=r"the prompt of row 0 is empty"):
        encode_one("", tokenizer=tokenizer(form="$A"))
    with pytest.raises(ConfigError, match=r"the prompt of row 0 is empty"):
        encode_one("")


def test_nulls_that_a_table_adds_to_messages_do_not_reach_the_template() -> None:
    rows = Dataset.from_list([{"prompt": [user("hello") | {"name": "a"}]}, {"prompt": [user("hello") | {"name": None}]}])
    named, unnamed = encode_prompts(rows, tokenizer())
    assert words(named.token_ids) == "<user> a : hello </s> <assistant>"
    assert words(unnamed.token_ids) == "<user> hello </s> <assistant>"
    assert unnamed.prompt == [user("hello")]


class OnlyRows:
    """No more than the protocol asks for."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        return self._rows[index]


def _chosen(rows: list[dict[str, Any]]) -> Dataset:
    """Rows of a greater table, in an order of their own."""
    return Dataset.from_list([{"prompt": "other", "answer": "", "extra": [0]}, *reversed(rows)]).select(range(len(rows), 0, -1))


@pytest.mark.parametrize("kind", [list, Dataset.from_list, OnlyRows, _chosen])
def test_columns_and_rows_are_kept_across_chunks_and_kinds_of_table(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_fast.tasks.prompts._CHUNK_ROWS", 3)
    rows = kind([{"prompt": f"hello {row}", "answer": str(row), "extra": [row]} for row in range(7)])
    prompts = encode_prompts(rows, tokenizer())
    assert [prompt.index for prompt in prompts] == list(range(7))
    assert [dict(prompt.columns) for prompt in prompts] == [{"answer": str(row), "extra": [row]} for row in range(7)]
    assert [words(prompt.token_ids) for prompt in prompts] == [f"<s> hello {row}" for row in range(7)]
    assert encode_prompts([] if kind in (list, _chosen) else kind([{"prompt": "a"}]), tokenizer())[1:] == []


def test_a_column_beside_the_prompt_is_not_decoded_before_it_is_asked_for() -> None:
    features = Features({"picture": Image(), "prompt": Value("string")})
    table = Dataset.from_dict({"prompt": ["1", "2", "3"], "picture": [{"bytes": b"none", "path": None}] * 3}, features=features)
    with pytest.raises(OSError, match="cannot identify image"):
        table[0]
    prompts = encode_prompts(table.select([2, 0]), tokenizer())
    assert [words(token_ids) for token_ids in prompts.token_ids()] == ["<s> 3", "<s> 1"]
    assert prompts.columns == ["picture"]


def test_a_table_that_makes_its_rows_is_read_as_it_makes_them() -> None:
    table = Dataset.from_list([{"text": "1", "answer": "a"}, {"text": "2", "answer": "b"}])
    made = table.with_transform(lambda batch: {"prompt": [f"hello {text}" for text in batch["text"]]})
    prompts = encode_prompts(made, tokenizer())
    assert [(words(prompt.token_ids), dict(prompt.columns)) for prompt in prompts] == [("<s> hello 1", {}), ("<s> hello 2", {})]
    shown = table.rename_column("text", "prompt").with_format(None, columns=["prompt"])
    assert encode_prompts(shown, tokenizer()).columns == []


def test_text_and_messages_may_be_mixed() -> None:
    prompts = encode_prompts([{"prompt": "1"}, {"prompt": [user("2")]}, {"prompt": "3"}], tokenizer())
    assert [words(prompt.token_ids) for prompt in prompts] == ["<s> 1", "<user> 2 </s> <assistant>", "<s> 3"]


def test_a_prompt_that_is_too_long_stops_or_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": text} for text in ("1", "1 2 3 4", "1 2")]
    with pytest.raises(ConfigError, match=r"row 1 has 5 tokens, more than max_prompt_length=3 .*overlong_prompts='drop'"):
        encode_prompts(rows, tokenizer(), max_prompt_length=3)
    with caplog.at_level(logging.WARNING):
        kept = encode_prompts(rows, tokenizer(), max_prompt_length=3, overlong="drop")
    assert [prompt.index for prompt in kept] == [0, 2]
    assert "1 of 3 prompts have more than 3 tokens" in caplog.text
    with pytest.raises(ConfigError, match=r"all 3 prompts have more than max_prompt_length=1"):
        encode_prompts(rows, tokenizer(), max_prompt_length=1, overlong="drop")


def test_a_tokeniser_that_changes_the_text_still_ends_without_an_end_token() -> None:
    unknown = tokenizer(form="<s> $A")
    unknown.backend_tokenizer.normalizer = normalizers.Replace("a", "")
    assert words(encode_one("hello 1", tokenizer=unknown).token_ids) == "<s> hello 1"


def test_no_rows_give_no_prompts() -> None:
    assert list(encode_prompts([], tokenizer())) == []


def test_large_sets_show_their_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("grpo_fast.tasks.prompts._PROGRESS_ROWS", 2)
    assert len(encode_prompts([{"prompt": "1"}] * 5, tokenizer())) == 5
    assert capsys.readouterr().out == ""


def test_the_embedded_model_reads_a_problem_character_by_character() -> None:
    embedded = AutoTokenizer.from_pretrained(embedded_model_dir())
    ids = encode_prompts([{"prompt": "347+586="}], embedded)[0].token_ids
    assert embedded.convert_ids_to_tokens(ids) == ["<bos>", *"347+586="]
