"""Pre-trains the embedded model: ``python -m grpo_fast.tasks.pretrain_arithmetic --output DIR``.

The corpus mixes, as found text does, three ways of writing a solution of ``347+586=``:

========= ====================================== ================================================================
Style     Text                                   What it is
========= ====================================== ================================================================
guess     ``#1240``                              a number pulled out of the air
careless  ``7+6=3,4+8=2,3+5=8#823``              columns added, whatever exceeds ten forgotten: right if none does
careful   ``7+6=13,4+8+1=13,3+5+1=9#933``        columns added, carries kept: always right
========= ====================================== ================================================================

A balanced textbook mixture comes first and teaches to add; a web mixture follows, in which careful work is a small
minority, and sets the habit. The model then knows how to carry but seldom does, sampled or greedy. Reinforcement
learning has to find that skill and make it the habit, which is what gives its reward curve the S shape. Held-out problems
never enter the corpus.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grpo_fast.tasks.arithmetic import ANSWER_MARK, NUM_DIGITS, is_held_out, problem_prompt

Style = Literal["guess", "careless", "careful"]
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz\n !\"#%&'()*+,-./:;<=>?_|"
MAX_LENGTH = 128
_IGNORED_LABEL = -100


@dataclass(frozen=True)
class PretrainConfig:
    """How the embedded model is made. The defaults made the shipped weights."""

    seed: int = 0
    """Decides weights, problems and styles."""
    textbook_steps: int = 1100
    """Optimiser updates on the textbook mixture, which teaches to add."""
    web_steps: int = 300
    """Optimiser updates on the web mixture, which sets the habit."""
    batch_size: int = 64
    """Solutions an update reads."""
    learning_rate: float = 4e-3
    """Peak; a cosine brings it down to a tenth over the textbook, a line from there to 0 over the web."""
    warmup_steps: int = 50
    """Updates over which the learning rate rises from 0."""
    textbook: Mapping[Style, float] = field(default_factory=lambda: {"guess": 0.1, "careless": 0.35, "careful": 0.55})
    """Share of each style in the textbook mixture."""
    web: Mapping[Style, float] = field(default_factory=lambda: {"guess": 0.20, "careless": 0.75, "careful": 0.05})
    """Share of each style in the web mixture."""

    @property
    def steps(self) -> int:
        """Optimiser updates in all."""
        return self.textbook_steps + self.web_steps


def write_solution(first: int, second: int, *, style: Style, rng: random.Random) -> str:
    """One solution text of ``first + second`` in a style of the table above; only ``guess`` reads ``rng``."""
    if style == "guess":
        return f"{ANSWER_MARK}{rng.randrange(2 * 10 ** (NUM_DIGITS - 1), 2 * 10**NUM_DIGITS)}"
    columns, digits, carry = [], [], 0
    for power in range(NUM_DIGITS):
        left, right = first // 10**power % 10, second // 10**power % 10
        total = left + right + carry
        shown = total if style == "careful" else total % 10
        columns.append(f"{left}+{right}{'+1' if carry else ''}={shown}")
        digits.append(str(shown if power == NUM_DIGITS - 1 else shown % 10))
        carry = shown // 10
    return ",".join(columns) + ANSWER_MARK + str(int("".join(reversed(digits))))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one token a character, which puts ``<bos>`` before every text.

    Text over ``ALPHABET`` comes back exactly from ``decode(..., skip_special_tokens=True)``; other characters are ``<unk>``.
    """
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *ALPHABET))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """A small Llama with fresh weights, equal for equal seeds; the global random state is left as it was."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        initializer_range=0.04,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def corpus_batch(
    mixture: Mapping[Style, float], batch_size: int, *, tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Draws one batch of solved problems, none of them held out.

    Returns:
        One or two parts, bare answers and worked solutions apart so that little is padding: ``input_ids`` and ``labels``,
        int64 [rows, length], right-padded; labels are ignored on prompts and padding.
    """
    low, high = 10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS
    parts: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for style in rng.choices(list(mixture), list(mixture.values()), k=batch_size):
        first, second = rng.randrange(low, high), rng.randrange(low, high)
        while is_held_out(first, second):
            first, second = rng.randrange(low, high), rng.randrange(low, high)
        solution = write_solution(first, second, style=style, rng=rng)
        parts[solution.startswith(ANSWER_MARK)].append((problem_prompt(first, second), solution))
    return [_encode(part, tokenizer=tokenizer) for part in parts.values() if part]


def _encode(part: Sequence[tuple[str, str]], *, tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    heads: list[list[int]] = tokenizer([prompt for prompt, _ in part]).input_ids
    tails: list[list[int]] = tokenizer([solution for _, solution in part], add_special_tokens=False).input_ids
    length = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True)) + 1
    input_ids = torch.full((len(heads), length), tokenizer.pad_token_id)
    labels = torch.full((len(heads), length), _IGNORED_LABEL)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        solution = torch.tensor([*tail, tokenizer.eos_token_id])
        end = len(head) + len(solution)
        input_ids[row, : len(head)] = torch.tensor(head)
        input_ids[row, len(head) : end] = solution
        labels[row, len(head) : end] = solution
    return input_ids, labels


def pretrain(config: PretrainConfig) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, list[float]]:
    """Trains a model on the corpus by next-token prediction.

    Returns:
        The model, its tokenizer and the loss of each update in nats per token.
    """
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=config.seed)
    rng = random.Random(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    losses = []
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config=config)
        mixture = config.textbook if step < config.textbook_steps else config.web
        parts = corpus_batch(mixture, config.batch_size, tokenizer=tokenizer, rng=rng)
        num_tokens = sum(int((labels != _IGNORED_LABEL).sum()) for _, labels in parts)
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for input_ids, labels in parts:
            logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
            nll = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED_LABEL, reduction="sum")
            (nll / num_tokens).backward()
            loss += float(nll.detach()) / num_tokens
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss)
    return model.eval(), tokenizer, losses


def _schedule(step: int, *, config: PretrainConfig) -> float:
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if step < config.textbook_steps:
        done = (step - config.warmup_steps) / (config.textbook_steps - config.warmup_steps)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
    return 0.1 * (1 - (step - config.textbook_steps) / config.web_steps)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, directory: Path) -> None:
    """Writes model and tokenizer as a directory ``from_pretrained`` loads without remote code."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5 writes its backend's name here, which transformers 4 and servers built on it do not know.
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # safetensors writes for the owner alone; in a package installed by another user the weights must be readable.
    for file in directory.iterdir():
        file.chmod(0o644)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: pre-trains and saves."""
    defaults = PretrainConfig()
    parser = argparse.ArgumentParser(description="Pre-train the embedded arithmetic model to a weak start.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--textbook-steps", type=int, default=defaults.textbook_steps)
    parser.add_argument("--web-steps", type=int, default=defaults.web_steps)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    options = parser.parse_args(arguments)
    config = PretrainConfig(
        seed=options.seed,
        textbook_steps=options.textbook_steps,
        web_steps=options.web_steps,
        batch_size=options.batch_size,
    )
    model, tokenizer, losses = pretrain(config)
    save(model, tokenizer, directory=options.output)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token after {config.steps} updates; written to {options.output}")


if __name__ == "__main__":
    main()
