from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_fast.rollout.stop_strings import StopScanner, cut_at_stop, decode

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, as the rare characters of a byte-level vocabulary have it."""
    core = Tokenizer(models.BPE({"</s>": 0, **{piece: number for number, piece in enumerate(BYTES, start=1)}}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def scan(tokenizer: PreTrainedTokenizerFast, tokens: list[int], stop: tuple[str, ...], every: int) -> int | None:
    scanner = StopScanner(tokenizer, stop)
    for start in range(0, len(tokens), every):
        count = scanner.feed(tokens[start : start + every])
        if count is not None:
            return start + count
    return None


@pytest.mark.parametrize("every", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("so the answer is 42.\n\nNext question", ("\n\n",)),
        ("aaab", ("b",)),
        ("ends with it###", ("###",)),
        ("a ## b ### c", ("###", "zzz")),
        ("two at once: END STOP", ("STOP", "END")),
        ("überall ✓ fertig ✓✓ mehr", ("✓✓",)),
        ("naïve 答え: 四十二 です", ("四十二",)),
    ],
)
def test_finds_the_first_token_whose_text_holds_a_stop_string(
    text: str, stop: tuple[str, ...], every: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    truth = next(count for count in range(1, len(tokens) + 1) if any(s in decode(tokenizer, tokens[:count]) for s in stop))
    assert scan(tokenizer, tokens, stop, every) == truth


@pytest.mark.parametrize("every", [1, 4])
def test_no_stop_string_no_end(every: int, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = [*tokenizer.encode("nothing here ✓ # # #", add_special_tokens=False), 0]
    assert scan(tokenizer, tokens, ("##", "</s>"), every) is None


def test_bytes_that_never_make_a_character_do_not_hide_what_follows(tokenizer: PreTrainedTokenizerFast) -> None:
    broken = [BYTES.index(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("✓")[0][0][0]) + 1] * 3
    tokens = [*broken, *tokenizer.encode("then STOP", add_special_tokens=False)]
    assert scan(tokenizer, tokens, ("STOP",), 1) == len(tokens)


def test_work_a_token_does_not_grow_with_the_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    scanner = StopScanner(tokenizer, ("STOP",))
    for token in tokenizer.encode("many words " * 50, add_special_tokens=False):
        assert scanner.feed([token]) is None
        assert len(scanner._window) <= 2
        assert len(scanner._tail) <= 3


def test_text_is_cut_at_the_earliest_stop_string() -> None:
    assert cut_at_stop("one two three", ("three", "two")) == "one "
    assert cut_at_stop("one two three", ("four",)) == "one two three"
    assert cut_at_stop("one", ()) == "one"
