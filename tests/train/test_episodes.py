from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from grpo_fast.environments import EnvironmentFailedError, Environments
from grpo_fast.rewards.call import RewardFunction
from grpo_fast.rollout.engine import SamplingParams
from grpo_fast.rollout.transformers_engine import TransformersEngine
from grpo_fast.tasks.prompts import encode_prompts
from grpo_fast.tasks.replies import Replies
from grpo_fast.tasks.tool_calls import ToolReplies
from grpo_fast.tools import NoEnvironment
from grpo_fast.train.distributed import ALONE, World
from grpo_fast.train.episodes import InTurns, OneTurn
from grpo_fast.train.policy import Policy
from grpo_fast.train.shares import SharedEngine
from grpo_fast.types import Completion, Group, Prompt, Scored
from tests.test_tools import Guessing, add
from tests.tool_chat import byte_tokenizer
from tests.train.test_shares import on_ranks

MakePolicy = Callable[..., Policy]
PROMPTS = [Prompt(10 + place, f"{letter}=", (4 + place, 14), {"answer": letter}) for place, letter in enumerate("abcde")]
SAMPLING = SamplingParams(max_tokens=60)


class Echo:
    """Says the answer and what it heard first, as long as it is spoken to at most twice; remembers all."""

    heard: list[tuple[str, list[str]]]

    def reset(self, prompt: str, answer: str) -> None:
        self.answer, self.texts = answer, list[str]()

    def step(self, completion: str) -> str | None:
        self.texts.append(completion)
        return f"{self.answer}+{completion[:1]}=" if len(self.texts) < 3 else None

    def get_reward(self) -> float:
        return float(len(self.texts))


def texts_heard(environments: list[Echo], **columns: Any) -> list[float]:
    return [len("".join(each.texts)) + ord(each.answer) for each in environments]


def in_turns(policy: Policy, environments: Environments, *, max_turns: int = 8, world: World = ALONE) -> InTurns:
    engine = TransformersEngine(policy.model, policy.tokenizer)
    return InTurns(
        engine if world.size == 1 else SharedEngine(engine, world),
        environments,
        Replies(policy.tokenizer, {}),
        max_turns=max_turns,
        world=world,
        judges=[RewardFunction("texts_heard", texts_heard)],
    )


def completions(groups: list[Group]) -> list[Completion]:
    return [completion for group in groups for completion in group.completions]


def said(completion: Completion) -> list[tuple[bool, tuple[int, ...]]]:
    """Who said what, in turn."""
    assert completion.episode is not None
    found: list[tuple[bool, tuple[int, ...]]] = []
    for token, sampled in zip(completion.token_ids, completion.episode.sampled, strict=True):
        if found and found[-1][0] == sampled and not (sampled and found[-1][1][-1] == 2):
            found[-1] = (sampled, (*found[-1][1], token))
        else:
            found.append((sampled, (token,)))
    return found


def policy_logprobs(policy: Policy, prompt: Prompt, completion: Completion, temperature: float = 1.0) -> torch.Tensor:
    """Of every token of the completion, in one pass over all of it."""
    tokens = torch.tensor([*prompt.token_ids, *completion.token_ids])
    with torch.no_grad():
        logits = policy.model(input_ids=tokens[None], use_cache=False).logits[0].double() / temperature
    first = len(prompt.token_ids)
    return logits.log_softmax(-1)[first - 1 : -1].gather(1, tokens[first:, None])[:, 0]


def test_policy_and_environment_speak_in_turn(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    with Environments(Echo) as environments:
        groups = in_turns(policy, environments).sample(PROMPTS, SAMPLING, num_generations=6, seed=3)
    first = OneTurn(TransformersEngine(policy.model, policy.tokenizer)).sample(PROMPTS, SAMPLING, num_generations=6, seed=3)
    decode = policy.tokenizer.decode
    num_turns = []
    for group, alone in zip(groups, first, strict=True):
        for found, begun in zip(group.completions, alone.completions, strict=True):
            assert found.episode is not None
            parts = said(found)
            assert parts[0] == (True, begun.token_ids), "the first turn is what it would be without an environment"
            for (who, before), (other, reply) in zip(parts[::2], parts[1::2], strict=False):
                assert (who, other) == (True, False)
                heard = decode(list(before), skip_special_tokens=True)
                assert decode(list(reply)) == f"{group.prompt.columns['answer']}+{heard[:1]}="
            assert found.text == decode(list(found.token_ids), skip_special_tokens=True)
            assert len(found.token_ids) <= SAMPLING.max_tokens
            assert found.episode.messages == ()
            assert found.num_sampled == sum(found.episode.sampled)
            turns = found.episode.num_turns
            assert len(parts) == 2 * turns - 1
            assert turns <= 3
            assert found.episode.reward == (turns if found.finish_reason == "stop" else found.episode.reward)
            num_turns.append(turns)
    assert {1, 2, 3} <= set(num_turns), "the guard: episodes differ in how they end"
    assert {completion.finish_reason for completion in completions(groups)} == {"stop", "length"}


@pytest.mark.parametrize("top_k", [0, 5])
def test_log_probabilities_are_those_of_the_whole_sequence(tiny_policy: MakePolicy, top_k: int) -> None:
    policy = tiny_policy()
    sampling = replace(SAMPLING, temperature=0.7, top_k=top_k)
    with Environments(Echo) as environments:
        groups = in_turns(policy, environments).sample(PROMPTS[:2], sampling, num_generations=6, seed=3)
    for group in groups:
        for found in group.completions:
            assert found.episode is not None
            sampled = torch.tensor(found.episode.sampled)
            told = torch.tensor(found.logprobs, dtype=torch.float64)
            assert (told[~sampled] == 0).all()
            if top_k:
                assert found.kept is not None
                assert len(found.kept) == found.num_sampled
                drawn = [t for t, mine in zip(found.token_ids, found.episode.sampled, strict=True) if mine]
                assert found.kept.drawn.tolist() == drawn
            else:
                expected = policy_logprobs(policy, group.prompt, found, temperature=0.7)
                assert (told - expected)[sampled].abs().max() < 1e-5
    assert sum(not all(c.episode.sampled) for c in completions(groups) if c.episode is not None) > 3


def test_draws_repeat_and_differ_between_turns_and_seeds(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    with Environments(Echo) as environments:
        player = in_turns(policy, environments)
        one, again = (player.sample(PROMPTS, SAMPLING, num_generations=4, seed=3) for _ in range(2))
        other = player.sample(PROMPTS, SAMPLING, num_generations=4, seed=4)
    assert completions(one) == completions(again)
    assert completions(one) != completions(other)
    turns = [part for found in completions(one) for part in [said(found)] if len(part) > 2]
    assert any(parts[0] != parts[2] for parts in turns)


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_play_together_what_one_would(count: int, tiny_policy: MakePolicy) -> None:
    policies = [tiny_policy() for _ in range(count)]
    with Environments(Echo) as environments:
        expected = in_turns(policies[0], environments).sample(PROMPTS, SAMPLING, num_generations=3, seed=11)

    def play(world: World) -> list[Group]:
        with Environments(Echo) as own:
            return in_turns(policies[world.rank], own, world=world).sample(PROMPTS, SAMPLING, num_generations=3, seed=11)

    for found in on_ranks(count, play):
        assert not isinstance(found, Exception)
        assert [c.token_ids for c in completions(found)] == [c.token_ids for c in completions(expected)]
        assert [c.episode for c in completions(found)] == [c.episode for c in completions(expected)]


def test_what_fails_on_one_rank_fails_on_all(tiny_policy: MakePolicy) -> None:
    class Failing(Echo):
        def step(self, completion: str) -> str | None:
            if self.answer == "e":
                raise LookupError("no such page")
            return super().step(completion)

    policies = [tiny_policy() for _ in range(2)]

    def play(world: World) -> Any:
        with Environments(Failing) as own:
            return in_turns(policies[world.rank], own, world=world).sample(PROMPTS, SAMPLING, num_generations=3, seed=11)

    for found in on_ranks(2, play):
        assert "step raised LookupError: no such page" in str(found)
        assert "for row 14" in str(found)


def test_turns_are_limited_and_the_environment_hears_the_last_one(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    with Environments(Echo) as environments:
        for limit in (1, 2):
            groups = in_turns(policy, environments, max_turns=limit).sample(PROMPTS, SAMPLING, num_generations=4, seed=3)
            found = [c.episode for c in completions(groups) if c.episode is not None and c.finish_reason == "stop"]
            assert max(episode.num_turns for episode in found) == limit
            assert all(episode.reward == episode.num_turns for episode in found)


def test_an_answer_that_leaves_no_room_ends_the_episode_as_cut(tiny_policy: MakePolicy) -> None:
    class Talkative(Echo):
        def step(self, completion: str) -> str:
            return "a" * 20

    with Environments(Talkative) as environments:
        player = in_turns(tiny_policy(), environments)
        found = completions(player.sample(PROMPTS, replace(SAMPLING, max_tokens=21), num_generations=4, seed=3))
        assert all(c.finish_reason == "length" for c in found)
        assert all(c.episode is not None and c.episode.num_turns == 1 and all(c.episode.sampled) for c in found)
        assert any(len(c.token_ids) < 21 for c in found)
        found = completions(player.sample(PROMPTS, replace(SAMPLING, max_tokens=30), num_generations=8, seed=3))
        longest = [c for c in found if c.episode is not None and c.episode.num_turns == 2]
        assert longest
        assert all(len(c.token_ids) <= 30 for c in longest)


def test_a_conversation_of_messages_is_kept_as_messages(tiny_policy: MakePolicy) -> None:
    policy = tiny_policy()
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )

    class Calling(Echo):
        def step(self, completion: str) -> Any:
            super().step(completion)
            return {"role": "tool", "content": "42"} if len(self.texts) == 1 else None

    try:
        asked = [replace(PROMPTS[0], prompt=[{"role": "user", "content": "6"}])]
        with Environments(Calling) as environments:
            groups = in_turns(policy, environments).sample(asked, SAMPLING, num_generations=8, seed=3)
    finally:
        policy.tokenizer.chat_template = None
    two = [c for c in completions(groups) if c.episode is not None and c.episode.num_turns == 2]
    assert two
    for found in two:
        assert found.episode is not None
        (_, before), (_, reply), (_, after) = said(found)
        texts = [policy.tokenizer.decode(list(ids), skip_special_tokens=True) for ids in (before, after)]
        assert found.episode.messages == (
            {"role": "assistant", "content": texts[0]},
            {"role": "tool", "content": "42"},
            {"role": "assistant", "content": texts[1]},
        )
        assert before[-1] == 2, "the end token was sampled, and is not repeated"
        assert policy.tokenizer.decode(list(reply)) == "<unk>42<eos>a"


class Scripted:
    """An engine that says what it is told to, a line a turn, and remembers what it was asked."""

    def __init__(self, tokenizer: Any, *lines: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._lines = iter(lines)
        self.asked: list[list[list[int]]] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, num_generations: int, **options: Any
    ) -> list[list[Completion]]:
        self.asked.append([list(ids) for ids in prompts])
        texts = iter(next(self._lines))
        return [[self._said(next(texts)) for _ in range(num_generations)] for _ in prompts]

    def _said(self, text: str) -> Completion:
        ids = tuple(self._tokenizer(text + "<|im_end|>")["input_ids"])
        return Completion(ids, (-0.5,) * len(ids), "stop", text)


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def play(
    engine_lines: Sequence[Sequence[str]], environments: Environments, **settings: Any
) -> tuple[Scripted, list[Group], Any]:
    """Two completions of one prompt."""
    tokenizer = byte_tokenizer()
    engine = Scripted(tokenizer, *engine_lines)
    rows = [{"prompt": [{"role": "user", "content": "Go."}], "secret": "tea"}]
    with environments:
        prompts = list(encode_prompts(rows, tokenizer, tools=environments.schemas))
        replies = ToolReplies(tokenizer, {}, environments.schemas)
        judges = settings.pop("judges", ())
        limit = SamplingParams(max_tokens=settings.pop("max_tokens", 400))
        player = InTurns(engine, environments, replies, max_turns=8, world=ALONE, judges=judges)  # type: ignore[arg-type]
        return engine, player.sample(prompts, limit, num_generations=2, seed=0), tokenizer


def test_tools_are_called_and_what_they_say_is_read_behind_the_very_tokens_that_were_sampled() -> None:
    both = call("add", '{"a": 2, "b": 40}') + "\n" + call("add", '{"c": 1}')
    lines = [[both, "No need."], ["It is 42."]]
    engine, [group], tokenizer = play(lines, Environments(NoEnvironment, tools={"add": add}))
    calling, silent = group.completions
    first, second = engine.asked
    assert [tuple(ids) for ids in first] == [group.prompt.token_ids]
    assert second == [[*group.prompt.token_ids, *calling.token_ids[: len(second[0]) - len(group.prompt.token_ids)]]]
    assert calling.episode is not None
    assert silent.episode is not None
    _, answered, failed, last = calling.episode.messages
    assert answered == {"role": "tool", "name": "add", "content": "42"}
    assert "unexpected keyword argument 'c'" in failed["content"]
    assert last == {"role": "assistant", "content": "It is 42."}
    (_, before), (_, reply), (_, after) = [(mine, ids) for mine, ids in said_by(calling)]
    assert before == tuple(tokenizer(both + "<|im_end|>")["input_ids"])
    assert after == tuple(tokenizer("It is 42.<|im_end|>")["input_ids"])
    asked = [{"role": "user", "content": "Go."}, *calling.episode.messages[:3]]
    whole = tokenizer.apply_chat_template(asked, tools=[add], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode([*group.prompt.token_ids, *before, *reply]) == whole
    assert (calling.episode.num_tool_calls, calling.episode.num_tool_failures, calling.episode.num_turns) == (2, 1, 2)
    assert (silent.episode.num_tool_calls, silent.episode.num_tool_failures, silent.episode.num_turns) == (0, 0, 1)
    assert silent.episode.messages == ({"role": "assistant", "content": "No need."},)


def said_by(completion: Completion) -> list[tuple[bool, tuple[int, ...]]]:
    """Who said what, in turn, of texts with marks of their own."""
    assert completion.episode is not None
    found: list[tuple[bool, tuple[int, ...]]] = []
    for token, sampled in zip(completion.token_ids, completion.episode.sampled, strict=True):
        if found and found[-1][0] == sampled:
            found[-1] = (sampled, (*found[-1][1], token))
        else:
            found.append((sampled, (token,)))
    return found


def test_what_reset_returns_is_read_behind_the_prompt_and_environments_are_judged_when_they_end() -> None:
    seen: list[Any] = []

    class Different(Guessing):
        made = 0

        def __init__(self) -> None:
            type(self).made += 1
            self.number = type(self).made

        def reset(self, secret: str) -> str | None:  # type: ignore[override]
            super().reset(secret)
            return f" Board {self.number}."

    def guesses(completions: list[Any], environments: list[Any], secret: list[str], **columns: Any) -> list[float]:
        seen.append(
            [(len(completion), type(environment)) for completion, environment in zip(completions, environments, strict=True)]
        )
        return [float(len(environment.guesses)) for environment in environments]

    lines = [[call("guess", '{"letter": "t"}'), "Nothing."], ["Enough."]]
    engine, [group], tokenizer = play(lines, Environments(Different), judges=[RewardFunction("guesses", guesses)])
    assert seen == [[(3, Different), (1, Different)]]
    one, other = group.completions
    texts = [tokenizer.decode(ids) for ids in engine.asked[0]]
    for number, (text, completion) in enumerate(zip(texts, group.completions, strict=True), start=1):
        assert completion.episode is not None
        asked = {"role": "user", "content": f"Go. Board {number}."}
        assert completion.episode.asked == (asked,)
        schemas = Environments(Different)
        with schemas:
            whole = tokenizer.apply_chat_template([asked], tools=schemas.schemas, tokenize=False, add_generation_prompt=True)
        assert text == whole
        (mine, opening), (_, sampled), *_ = said_by(completion)
        assert not mine
        assert [*group.prompt.token_ids, *opening] == tokenizer(whole)["input_ids"]
        assert completion.text.startswith(("<tool_call>", "Nothing."))
        assert completion.logprobs[: len(opening) + 1] == (*[0.0] * len(opening), -0.5)
        assert sampled[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(list(group.prompt.token_ids)).endswith("<|im_start|>user\nGo.")
    assert one.episode is not None
    assert other.episode is not None
    assert (one.episode.judgements, other.episode.judgements) == ((Scored([1.0]),), (Scored([0.0]),))
    assert engine.asked[1] == [
        [*group.prompt.token_ids, *one.token_ids[: len(engine.asked[1][0]) - len(group.prompt.token_ids)]]
    ]
    assert (one.episode.reward, other.episode.reward) == (0.0, 0.0)


def test_an_observation_that_leaves_no_room_is_told() -> None:
    class Wordy(Guessing):
        def reset(self, secret: str) -> str:  # type: ignore[override]
            return "word " * 30

    with pytest.raises(EnvironmentFailedError, match=r"row 0 has \d+ tokens, which leaves no room in max_completion_length=20"):
        play([], Environments(Wordy), max_tokens=20)
