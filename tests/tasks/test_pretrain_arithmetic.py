from __future__ import annotations

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from grpo_fast import assets
from grpo_fast.assets import embedded_model_dir
from grpo_fast.tasks.arithmetic import arithmetic_accuracy, arithmetic_task, draw_problem, given_answer, is_held_out
from grpo_fast.tasks.pretrain_arithmetic import (
    ALPHABET,
    SPECIAL_TOKENS,
    PretrainConfig,
    build_model,
    build_tokenizer,
    corpus_batch,
    main,
    pretrain,
    write_solution,
)


@pytest.fixture(scope="module")
def shipped():
    directory = embedded_model_dir()
    return AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


def complete(model, tokenizer, prompts, *, sample):
    encoded = tokenizer(prompts, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(
            input_ids=encoded.input_ids,
            attention_mask=encoded.attention_mask,
            do_sample=sample,
            top_k=0,
            max_new_tokens=32,
        )
    return tokenizer.batch_decode(output[:, encoded.input_ids.shape[1] :], skip_special_tokens=True)


def test_styles_of_the_documented_example():
    rng = random.Random(0)
    assert write_solution(347, 586, style="careful", rng=rng) == "7+6=13,4+8+1=13,3+5+1=9#933"
    assert write_solution(347, 586, style="careless", rng=rng) == "7+6=3,4+8=2,3+5=8#823"
    assert given_answer(write_solution(347, 586, style="guess", rng=rng)) is not None


def test_careful_work_is_right_and_careless_work_only_where_nothing_carries():
    rng = random.Random(0)
    right = 0
    for index in range(1000):
        first, second = draw_problem(5, index=index, split="train")
        careful = write_solution(first, second, style="careful", rng=rng)
        careless = write_solution(first, second, style="careless", rng=rng)
        assert given_answer(careful) == str(first + second)
        for column in careful.partition("#")[0].split(","):
            summands, total = column.split("=")
            assert sum(map(int, summands.split("+"))) == int(total)
        carries = any(int(a) + int(b) > 9 for a, b in zip(str(first), str(second), strict=True))
        assert (given_answer(careless) == str(first + second)) == (not carries)
        assert max(len(careful), len(careless)) <= 32
        right += not carries
    assert 0.08 < right / 1000 < 0.19


def test_tokenizer_is_one_token_a_character_and_gives_text_back_exactly():
    tokenizer = build_tokenizer()
    rng = random.Random(0)
    texts = ["", "347+586=", "  two  spaces , and . stops !\n\n", ALPHABET]
    texts += ["".join(rng.choices(ALPHABET, k=rng.randrange(60))) for _ in range(200)]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text) + 1
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4
    assert len(tokenizer) == len(ALPHABET) + len(SPECIAL_TOKENS) == 64
    assert tokenizer.chat_template is None
    assert tokenizer("é").input_ids[1] == tokenizer.unk_token_id


def test_corpus_labels_are_the_solutions_and_nothing_held_out_is_in_it():
    tokenizer = build_tokenizer()
    rng = random.Random(0)
    mixture = {"guess": 0.3, "careless": 0.3, "careful": 0.4}
    parts = corpus_batch(mixture, 400, tokenizer=tokenizer, rng=rng)
    assert sum(len(input_ids) for input_ids, _ in parts) == 400
    right = 0
    for input_ids, labels in parts:
        assert input_ids.dtype == labels.dtype == torch.int64
        for row, label in zip(input_ids, labels, strict=True):
            prompt, _, solution = tokenizer.decode(row, skip_special_tokens=True).partition("=")
            first, second = map(int, prompt.split("+"))
            assert not is_held_out(first, second)
            scored = label[label != -100]
            assert tokenizer.decode(scored) == solution + "<eos>"
            assert torch.equal(row[label != -100], scored)
            right += given_answer(solution) == str(first + second)
    assert 0.35 < right / 400 < 0.55


@pytest.mark.slow
def test_pretraining_lowers_the_loss_and_repeats_exactly():
    config = PretrainConfig(textbook_steps=30, web_steps=2, batch_size=16, warmup_steps=5)
    state = torch.random.get_rng_state()
    model, _, losses = pretrain(config)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(losses) == config.steps
    assert losses[29] < 0.6 * losses[0]
    again, _, same_losses = pretrain(config)
    assert losses == same_losses
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_seed_decides_the_weights():
    tokenizer = build_tokenizer()
    weights = [build_model(tokenizer, seed=seed).lm_head.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_script_writes_a_directory_that_from_pretrained_loads(tmp_path, capsys):
    main(["--output", str(tmp_path / "model"), "--textbook-steps", "3", "--web-steps", "1", "--batch-size", "4", "--seed", "1"])
    assert "after 4 updates" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode(tokenizer("1+2=3, yes").input_ids, skip_special_tokens=True) == "1+2=3, yes"
    expected, _, _ = pretrain(PretrainConfig(seed=1, textbook_steps=3, web_steps=1, batch_size=4))
    input_ids = torch.tensor([tokenizer("347+586=").input_ids])
    assert torch.equal(model.eval()(input_ids=input_ids).logits, expected(input_ids=input_ids).logits)
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_missing_weights_are_named_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="pretrain_arithmetic --output"):
        embedded_model_dir()


def test_shipped_files_are_small_and_need_no_code(shipped):
    directory = embedded_model_dir()
    assert (directory / "model.safetensors").stat().st_size < 4_000_000
    assert {path.suffix for path in directory.iterdir()} == {".json", ".safetensors"}
    declared = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert declared["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_shipped_model_is_an_untied_llama_that_servers_accept(shipped):
    model, tokenizer = shipped
    assert isinstance(model, LlamaForCausalLM)
    assert model.config.head_dim >= 32
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


@pytest.mark.parametrize("sample", [False, True])
def test_shipped_model_starts_weak(shipped, sample):
    model, tokenizer = shipped
    torch.manual_seed(0)
    rows = arithmetic_task(size=1, eval_size=256, seed=0).eval
    prompts = [row["prompt"] for row in rows]
    completions = complete(model, tokenizer, prompts, sample=sample)
    rewards = arithmetic_accuracy(prompts, completions, answer=[row["answer"] for row in rows])
    assert 0.05 <= sum(rewards) / len(rewards) <= 0.25
    assert sum(given_answer(completion) is not None for completion in completions) > 0.9 * len(completions)


def test_shipped_model_knows_how_to_carry(shipped):
    model, tokenizer = shipped
    rng = random.Random(0)
    problems = [draw_problem(11, index=index, split="eval") for index in range(400)]
    carrying = [(first, second) for first, second in problems if first % 10 + second % 10 > 9]
    solutions = [write_solution(first, second, style="careful", rng=rng) for first, second in carrying]
    begun = [f"{first}+{second}={text.partition(',')[0]}" for (first, second), text in zip(carrying, solutions, strict=True)]
    assert len(begun) > 100
    ends = complete(model, tokenizer, begun, sample=False)
    right = [given_answer(end) == str(first + second) for end, (first, second) in zip(ends, carrying, strict=True)]
    assert sum(right) / len(right) > 0.9
