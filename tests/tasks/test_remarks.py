from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Audio, Dataset, Features, Image, Sequence, Value
from transformers import AutoTokenizer

from grpo_fast.assets import embedded_model_dir
from grpo_fast.tasks.remarks import few_held_out, plain_text, repeats, rounded, unreadable, unseen
from grpo_fast.tasks.tables import read_files
from grpo_fast.types import Prompt


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(index, text, tuple(map(ord, text))) for index, text in enumerate(texts)]


def test_different_prompts_are_nothing_to_speak_of() -> None:
    assert repeats(prompts(*"abcdefgh"), prompts(*"xy"), prompts_per_step=8) == []
    assert repeats(prompts(*"abcdefghijj"), [], prompts_per_step=8) == [], "one in eleven"


def test_what_comes_again_is_told() -> None:
    (told,) = repeats(prompts(*"aabbccdd"), [], prompts_per_step=4)
    assert told == "only 4 of 8 prompts are distinct"
    (told,) = repeats(prompts(*"abc"), prompts("x", "b", "c"), prompts_per_step=3)
    assert told.startswith("2 of 3 held-out prompts are trained on too, such as 'b'")
    (told,) = repeats(prompts(*"abc"), [], prompts_per_step=4)
    assert told.startswith("prompts_per_step=4 exceeds the number of prompts, 3")


def test_a_long_prompt_is_not_shown_whole() -> None:
    (told,) = repeats(prompts("a" * 500), prompts("a" * 500), prompts_per_step=1)
    assert len(told) < 300


def test_plain_text_is_told_and_messages_are_not() -> None:
    (told,) = plain_text(2, 3)
    assert told.startswith("2 of 3 prompts are plain text")
    assert "system_prompt" in told
    assert plain_text(0, 3) == []


def test_characters_that_the_tokeniser_does_not_know_are_told() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    said = [
        Prompt(number, text, tuple(tokenizer(text)["input_ids"]))
        for number, text in enumerate(["1+2=", "\u00e9", "zwei\u4e2d"])
    ]
    (told,) = unreadable(said, tokenizer)
    assert told.startswith("2 of 3 prompts, such as '\u00e9', have characters that the model's tokeniser does not know")
    assert f"reads as {tokenizer.unk_token}; leave them out, or take another model" in told
    assert unreadable(said[:1], tokenizer) == []
    tokenizer.eos_token = tokenizer.unk_token  # as in GPT-2, whose tokens are of bytes
    assert unreadable(said, tokenizer) == []


@pytest.mark.parametrize(
    "kind",
    [Image(), Audio(), Sequence(Image()), [Image()], {"seen": Image()}, Sequence({"seen": Image(), "at": Value("int32")})],
)
def test_what_the_model_is_not_shown_is_told(kind: object) -> None:
    text = {"prompt": Value("string"), "parts": Sequence(Value("string"))}
    (told,) = unseen(Dataset.from_dict({"prompt": [], "parts": [], "given": []}, features=Features(text | {"given": kind})))
    assert told.startswith("the column 'given' holds images, video or audio, which the model does not see")
    assert unseen(Dataset.from_dict({"prompt": [], "parts": []}, features=Features(text))) == []
    assert unseen([{"prompt": "a", "given": "b"}]) == []


def test_pictures_in_hand_are_told_by_the_names_of_their_columns() -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed").fromarray(np.zeros((2, 2, 3), np.uint8))
    (told,) = unseen(Dataset.from_list([{"prompt": "a", "image": image, "images": [image]}]))
    assert told.startswith("the columns 'image', 'images' hold images")


def test_fewer_held_out_prompts_than_were_asked_for_are_told() -> None:
    told = ["only 40 of the 500 prompts of eval_size are held out, and 160 are trained on"]
    assert few_held_out(500, 40, num_prompts=160) == told
    assert (
        few_held_out(40, 40, num_prompts=160) == few_held_out(0, 40, num_prompts=160) == few_held_out(9, 0, num_prompts=9) == []
    )


def test_large_answers_of_a_json_file_are_told_to_have_lost_digits(tmp_path: Path) -> None:
    def read(*answers: str) -> Dataset:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        file.write_text("".join(f'{{"answer": {answer}}}\n' for answer in answers), encoding="utf-8")
        return read_files({"train": file}, split="train")

    large = read("2", "null", "99999999999999999999")
    assert large["answer"][2] != 99999999999999999999, "there is something to tell"
    [told] = rounded(large)
    assert told.startswith("1 of 3 answers are numbers of 2**53 or more")
    assert rounded(read("2", "9007199254740993")) == rounded(read("2.5", "900719925474099")) == []
    assert rounded(read('"99999999999999999999"')) == rounded([{"prompt": "p"}]) == []
