from __future__ import annotations

from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_fast.config import ConfigError
from grpo_fast.tasks.replies import Replies, num_shared
from tests.tool_chat import byte_tokenizer

# As templates of thinking models do: an end mark and a space behind each message, the tool's words inside the user's, thoughts
# of earlier turns left out, and an empty one put before an answer that is the last.
TEMPLATE = (
    "<s> {% for m in messages %}"
    "{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ 'user' if m.role == 'tool' else m.role }}> "
    "{% if m.role == 'assistant' %}{% if loop.last %}<think> </think> {% endif %}{{ m.content.split('</think>')[-1].strip() }} "
    "{% elif m.role == 'tool' %}[ {{ m.content }} ] {% else %}{{ m.content }} {% endif %}</s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% if thinking %}<think> {% endif %}{% endif %}"
)
MARKS = ["<unk>", "<s>", "</s>", "<user>", "<assistant>", "<think>", "</think>", "[", "]"]
WORDS = [*MARKS, "what", "the", "policy", "said", "a", "question", "go", "on", "42"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    return fast


def words(ids: Sequence[int]) -> str:
    return " ".join(WORDS[index] for index in ids)


def test_messages_stand_between_the_end_of_one_answer_and_the_beginning_of_the_next(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    replies = Replies(tokenizer, {})
    end = WORDS.index("</s>")
    tool = [{"role": "tool", "content": "42"}]
    assert words(replies.token_ids(tool, last_token=end)) == "<user> [ 42 ] </s> <assistant>"
    # where the answer ended otherwise, by a stop string, the template's end mark is put behind it
    assert words(replies.token_ids(tool, last_token=WORDS.index("said"))) == "</s> <user> [ 42 ] </s> <assistant>"
    two = [*tool, {"role": "user", "content": "go on"}]
    assert words(replies.token_ids(two, last_token=end)) == "<user> [ 42 ] </s> <user> go on </s> <assistant>"


def test_the_next_answer_begins_as_the_first_one_did(tokenizer: PreTrainedTokenizerFast) -> None:
    replies = Replies(tokenizer, {"thinking": True})
    found = replies.token_ids([{"role": "user", "content": "go on"}], last_token=2)
    assert words(found) == "<user> go on </s> <assistant> <think>"


def test_tokens_continue_the_conversation_as_the_template_would_render_it(tokenizer: PreTrainedTokenizerFast) -> None:
    asked, said = {"role": "user", "content": "a question"}, {"role": "assistant", "content": "the policy said"}
    reply = [{"role": "tool", "content": "42"}]
    before = tokenizer.apply_chat_template([asked], add_generation_prompt=True)["input_ids"]
    sampled = tokenizer("the policy said </s>", add_special_tokens=False)["input_ids"]
    whole = tokenizer.apply_chat_template([asked, said, *reply], add_generation_prompt=True)["input_ids"]
    assert [*before, *sampled, *Replies(tokenizer, {}).token_ids(reply, last_token=sampled[-1])] == whole


def test_text_goes_on_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    replies = Replies(tokenizer, {})
    assert words(replies.token_ids("[ 42 ]", last_token=2)) == "[ 42 ]"
    assert replies.decode((9, 12, 2)) == "what said"


@pytest.mark.parametrize(("text", "pieces"), [("42=", ["4", "2", "="]), (" 42", ["▁", "4", "2"]), ("\n4", ["\n", "4"])])
def test_no_space_is_put_before_text_that_goes_on(text: str, pieces: list[str]) -> None:
    """Tokenisers made like SentencePiece put one before whatever they are given."""
    fast = Tokenizer(models.BPE({each: number for number, each in enumerate("▁\n42=")}, []))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast)
    assert tokenizer.tokenize("42=")[0] == "▁", "as it would be alone"
    ids = Replies(tokenizer, {}).token_ids(text, last_token=0)
    assert tokenizer.convert_ids_to_tokens(ids) == pieces


def test_what_a_template_cannot_take_is_told(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"refuses the environment's messages \[\{'role': 'bad'.*no such role"):
        Replies(tokenizer, {}).token_ids([{"role": "bad", "content": ""}], last_token=2)
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ConfigError, match="drops earlier assistant turns"):
        Replies(tokenizer, {}).token_ids([{"role": "user", "content": "go on"}], last_token=2)


def test_an_observation_stands_behind_the_last_message(tokenizer: PreTrainedTokenizerFast) -> None:
    replies = Replies(tokenizer, {"thinking": True})
    prompt = [{"role": "user", "content": "what"}]
    asked = replies.observed(prompt, " a question")
    assert (asked, prompt) == ([{"role": "user", "content": "what a question"}], [{"role": "user", "content": "what"}])
    assert words(replies.prompt_ids(asked, index=3)) == "<s> <user> what a question </s> <assistant> <think>"
    parts = replies.observed([{"role": "user", "content": [{"type": "text", "text": "what"}]}], "on")
    assert parts == [{"role": "user", "content": [{"type": "text", "text": "what"}, {"type": "text", "text": "on"}]}]
    with pytest.raises(ConfigError, match=r"refuses the prompt of row 3 .*no such role"):
        replies.prompt_ids([{"role": "bad", "content": ""}], index=3)


def test_shared_beginnings_are_counted() -> None:
    assert num_shared([(1, 2, 3), (1, 2), (1, 2, 4)]) == 2
    assert num_shared([(1, 2), (3,)]) == 0
    assert num_shared(["abc", "abd"]) == 2
    assert num_shared([[1, 2, 3]]) == 3


def test_of_a_reply_without_room_only_a_begin_is_read() -> None:
    tokenizer = byte_tokenizer()
    replies = Replies(tokenizer, {})
    book = [{"role": "tool", "content": "a leaf " * 100_000}]
    begin = replies.token_ids(book, last_token=tokenizer.eos_token_id, room=50)
    assert 50 < len(begin) < 5_000
    for words in (1, 40, 400):
        reply = [{"role": "tool", "content": "a leaf " * words}]
        whole = replies.token_ids(reply, last_token=tokenizer.eos_token_id)
        for room in (1, len(whole) - 1, len(whole), len(whole) + 1, 10 * len(whole)):
            found = replies.token_ids(reply, last_token=tokenizer.eos_token_id, room=room)
            assert (len(found) < room) == (len(whole) < room)
            assert found == whole or len(whole) > room


def test_half_characters_are_question_marks() -> None:
    tokenizer = byte_tokenizer()
    found = Replies(tokenizer, {}).token_ids("a\ud83d b\udcff", last_token=0)
    assert tokenizer.decode(found) == "a? b?"
