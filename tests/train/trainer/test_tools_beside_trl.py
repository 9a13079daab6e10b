"""Tools in TRL's own trainer and in this one: the same turns of the policy, answered by the same tools."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from grpo_fast.config import Config
from grpo_fast.rollout.engine import RolloutEngine, SamplingParams
from grpo_fast.train import GRPOTrainer
from grpo_fast.types import Completion
from tests.tool_chat import byte_tokenizer

pytest.importorskip("trl", reason="TRL is not installed; the comparison needs it")

LIMIT = 400
ROWS = [{"prompt": [{"role": "user", "content": "Go."}]}] * 16


def add(a: int, b: int = 1) -> int:
    """Adds.

    Args:
        a: one
        b: two
    """
    return a + b


async def later(a: int) -> dict[str, int]:
    """Waits.

    Args:
        a: one
    """
    await asyncio.sleep(0.01)
    if a > 5:
        raise RuntimeError("too much")
    return {"a": a}


def nothing() -> None:
    """Does nothing."""


def long(n: int) -> dict[str, str]:
    """Says much.

    Args:
        n: how much
    """
    return {"x": "y" * n}


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


TURNS = [
    [call("add", '{"a": 1, "b": 2}'), "It is 3."],
    ["No call."],
    [call("add", '{"a": 1}') + "\n" + call("add", '{"a": 10}') + "\n" + call("later", '{"a": 4}'), "2, 11, 4"],
    ["<tool_call>\n{broken\n</tool_call>"],
    [call("later", '{"a": 9}'), call("add", '{"a": 1, "c": 3}'), "oh"],
    [call("nothing", "{}"), call("long", '{"n": 3}'), "three"],
    [call("long", '{"n": 500}')],  # which leaves no room
    ["I add. " + call("add", '{"a": 1}'), "2"],
]
"""What the policy says in each of eight completions, turn by turn."""


class Script:
    """Gives the next turn of whatever completions are asked for, in their order."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._turns = [[tokenizer(f"{turn}<|im_end|>").input_ids for turn in turns] for turns in TURNS]
        self._said: list[list[int]] = [[] for _ in TURNS]

    def next_turns(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        answers, places = [], iter(range(len(TURNS)))
        for prompt in prompts:
            place = next(place for place in places if list(prompt[: len(self._said[place])]) == self._said[place])
            answers.append(self._turns[place].pop(0))
            self._said[place] = [*prompt, *answers[-1]]
            if not self._turns[place]:
                self._said[place].append(-1)  # nothing goes on from here
        return answers


class Scripted(RolloutEngine):
    """An engine that says what the script does, with the policy's log-probabilities."""

    def __init__(self, script: Script, model: torch.nn.Module) -> None:
        self._script, self._model = script, model

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, num_generations: int, seed: int, **_: Any
    ) -> list[list[Completion]]:
        prompts = [prompt for prompt in prompts for _ in range(num_generations)]
        made = []
        for prompt, answer in zip(prompts, self._script.next_turns(prompts), strict=True):
            logits = self._model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0].tolist()
            made.append(Completion(tuple(answer), tuple(logprobs), "stop", ""))
        return [made[place : place + num_generations] for place in range(0, len(made), num_generations)]

    def sync_weights(self, *_: Any, **__: Any) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


class Heard:
    """A reward, and the messages that it got."""

    __name__ = "heard"

    def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        self.messages = [[dict(message) for message in each] for each in completions]
        return [float(sum(len(message["content"]) for message in each) % 7) for each in completions]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedTokenizerBase]:
    from trl.chat_template_utils import qwen3_chat_template

    directory, tokenizer = tmp_path_factory.mktemp("tools"), byte_tokenizer(qwen3_chat_template)
    tokenizer.add_tokens([AddedToken(tag) for tag in ("<tool_response>", "</tool_response>")])
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, initializer_range=0.2, **sizes, **ends)
    ).save_pretrained(directory)
    return directory, tokenizer


TOOLS = [add, later, nothing, long]


def of_trl(
    loss_type: str, place: tuple[Path, PreTrainedTokenizerBase], reward: Heard, output_dir: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    """What TRL's trainer makes of the script: the step's batch, and what it logs."""
    from trl import GRPOConfig
    from trl import GRPOTrainer as TheirTrainer

    directory, tokenizer = place
    script = Script(tokenizer)
    batch: dict[str, Any] = {}

    class Told(TheirTrainer):  # type: ignore[misc]
        def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
            return script.next_turns(prompt_ids), None

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            batch.update(super()._generate_and_score_completions(inputs))
            return batch

    arguments = GRPOConfig(
        str(output_dir),
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=LIMIT,
        max_tool_calling_iterations=4,
        loss_type=loss_type,
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=1e9,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
    )
    model = AutoModelForCausalLM.from_pretrained(directory)
    trainer = Told(model, reward, arguments, Dataset.from_list(ROWS), processing_class=tokenizer, tools=TOOLS)
    trainer.train()
    return batch, {name: value for entry in trainer.state.log_history for name, value in entry.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # TRL's own
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_what_is_trained_on_is_what_trl_trains_on(
    loss_type: str, place: tuple[Path, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    directory, tokenizer = place
    theirs, ours = Heard(), Heard()
    batch, logged = of_trl(loss_type, place, theirs, tmp_path / "theirs")
    config = Config(
        output_dir=tmp_path / "ours",
        model=str(directory),
        device="cpu",
        loss_type=loss_type,
        prompts_per_step=1,
        num_generations=8,
        max_completion_length=LIMIT,
        max_turns=5,
        max_steps=1,
        learning_rate=1e-12,
        max_grad_norm=1e9,
        eval_size=0,
        baseline_probe=0,
        reward_workers=0,
        sinks=(),
        report=False,
    )
    engine = Scripted(Script(tokenizer), AutoModelForCausalLM.from_pretrained(directory))
    with GRPOTrainer(config, reward_funcs=ours, train_dataset=ROWS, tools=TOOLS, engine=engine) as own:
        [step] = own.steps()
    [group] = step.groups
    tokens, sampled = (
        [row[real].tolist() for row, real in zip(batch[name], batch["completion_mask"].bool(), strict=True)]
        for name in ("completion_ids", "tool_mask")
    )
    assert 0 < sum(map(sum, sampled)) < sum(map(len, sampled)), "some tokens are the tools'"
    assert [list(completion.token_ids) for completion in group.completions] == tokens
    assert [[int(each) for each in one.episode.sampled] for one in group.completions if one.episode is not None] == sampled
    assert ours.messages == theirs.messages
    assert group.advantages == pytest.approx(batch["advantages"].tolist(), abs=1e-5)
    for name in ("loss", "grad_norm", "tools/call_frequency", "tools/failure_frequency"):
        assert step.metrics[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-6), name
    assert logged["grad_norm"] > 1e-3
    assert logged["tools/failure_frequency"] > 0
