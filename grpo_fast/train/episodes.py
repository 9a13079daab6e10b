"""Groups: prompts with their completions, sampled in one turn, or in several where an environment answers in between.

Between turns the sequence only grows: the policy goes on from the very tokens that it sampled, which its log-probabilities are
of. Every draw depends on the run's seed, the step and the turn alone, so that an episode is played again as it was, where its
environment does the same again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, repeat
from typing import NamedTuple

from grpo_fast.environments import EnvironmentFailedError, Environments, Episodes, Reply
from grpo_fast.kept_tokens import KeptTokens
from grpo_fast.rewards import RewardFunction
from grpo_fast.rewards.judged import judge
from grpo_fast.rollout.engine import RolloutEngine, SamplingParams
from grpo_fast.tasks.replies import Replies, num_shared
from grpo_fast.train.distributed import World
from grpo_fast.train.rng import derive_seed
from grpo_fast.types import Completion, Episode, Group, Message, Prompt, Scored, TrainerState


class _Asked(NamedTuple):
    """What is to be answered, and how; see :meth:`Sampler.sample`."""

    prompts: Sequence[Prompt]
    sampling: SamplingParams
    num_generations: int
    seed: int
    state: TrainerState


class Sampler(ABC):
    """Has an engine answer prompts.

    Args:
        engine: samples.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        num_generations: int,
        seed: int,
        state: TrainerState | None = None,
    ) -> list[Group]:
        """Samples ``num_generations`` answers to each prompt.

        Args:
            prompts: P.
            sampling: limits and distribution.
            num_generations: answers a prompt.
            seed: of all draws.
            state: how far the run is, for reward functions that read environments; without one, nothing is done yet.

        Raises:
            RolloutError: the engine failed.
            EnvironmentFailedError: an environment did.
            ConfigError: the chat template refuses what an environment said.
        """
        return self._groups(_Asked(prompts, sampling, num_generations, seed, state or TrainerState()))

    def sleep(self) -> None:
        """Lets the engine sleep until its weights are renewed."""
        self._engine.sleep()

    @abstractmethod
    def _groups(self, asked: _Asked) -> list[Group]:
        """Each prompt with its answers."""

    def _answered(self, asked: _Asked) -> list[Group]:
        """The same, as the engine gives them in one turn."""
        token_ids = [prompt.token_ids for prompt in asked.prompts]
        answers = self._engine.generate(token_ids, asked.sampling, num_generations=asked.num_generations, seed=asked.seed)
        return [Group(prompt, completions) for prompt, completions in zip(asked.prompts, answers, strict=True)]


class OneTurn(Sampler):
    """Completions as the engine gives them."""

    def _groups(self, asked: _Asked) -> list[Group]:
        return self._answered(asked)


@dataclass(slots=True)
class _Sequence:
    """One completion as it grows."""

    prompt: Prompt
    asked: list[Message] = field(default_factory=list)
    """The prompt with what the environment put behind it; empty where it put nothing."""
    opening: list[int] = field(default_factory=list)
    """Tokens of that which stand behind the prompt's own."""
    turns: list[Completion] = field(default_factory=list)
    replies: list[list[int]] = field(default_factory=list)
    """Tokens that stand behind each turn but the last."""
    messages: list[Message] = field(default_factory=list)
    cut: bool = False
    """Whether what the environment said would have exceeded the length limit."""

    def said(self, turn: Completion, replies: Replies) -> None:
        """The policy said something."""
        message = replies.said(turn.token_ids, context=[*self.prompt.token_ids, *self.token_ids])
        self.turns.append(turn)
        self.messages.append(message)

    @property
    def parts(self) -> Iterator[tuple[Completion, list[int]]]:
        """Turns, each with the tokens behind it."""
        nothing: list[int] = []
        return zip(self.turns, chain(self.replies, repeat(nothing)), strict=False)

    @property
    def token_ids(self) -> list[int]:
        """All of it so far."""
        return self.opening + [token for turn, reply in self.parts for token in (*turn.token_ids, *reply)]


class InTurns(Sampler):
    """Completions in which an environment answers the policy until it has no more to say, or a limit is reached.

    Args:
        engine: samples, for all ranks.
        environments: of this rank.
        replies: tokenises what they say, and reads what the policy says.
        max_turns: how often the policy speaks at most.
        world: the ranks; each plays its share of the episodes' other side.
        judges: reward functions that read environments.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        environments: Environments,
        replies: Replies,
        *,
        max_turns: int,
        world: World,
        judges: Sequence[RewardFunction] = (),
    ) -> None:
        super().__init__(engine)
        self._environments = environments
        self._replies = replies
        self._max_turns = max_turns
        self._world = world
        self._judges = judges

    def _groups(self, asked: _Asked) -> list[Group]:
        count = asked.num_generations
        grown = [_Sequence(prompt) for prompt in asked.prompts for _ in range(count)]
        share = self._world.share(len(grown))
        with self._begin(grown, share, num_generations=count, max_tokens=asked.sampling.max_tokens) as episodes:
            if any(each.asked for each in grown):
                self._speak(grown, asked.sampling, asked.seed)
            else:
                turns = (turn for group in self._answered(asked) for turn in group.completions)
                for each, turn in zip(grown, turns, strict=True):
                    each.said(turn, self._replies)
            self._play(grown, episodes, share, sampling=asked.sampling, seed=asked.seed)
            whole = self._completions(grown, episodes, share, asked.state)
        firsts = range(0, len(grown), count)
        return [Group(grown[first].prompt, whole[first : first + count]) for first in firsts]

    def _begin(self, grown: Sequence[_Sequence], share: slice, *, num_generations: int, max_tokens: int) -> Episodes:
        """Begins episodes, and puts behind the prompts what environments have to say there."""
        begun: list[Episodes] = []

        def begin() -> list[str]:
            begun.append(self._environments.begin([each.prompt for each in grown[share]]))
            return begun[0].observations

        told = [observation for part in self._world.gather(begin) for observation in part]
        if any(told):
            for first in range(0, len(grown), num_generations):
                group = slice(first, first + num_generations)
                self._observe(grown[group], told[group], max_tokens=max_tokens)
        return begun[0]

    def _observe(self, group: Sequence[_Sequence], told: Sequence[str], *, max_tokens: int) -> None:
        """Puts observations behind a prompt; its tokens are then those that all of its completions begin with."""
        prompt = group[0].prompt
        read = [prompt.token_ids]
        for each, observation in zip(group, told, strict=True):
            each.asked = self._replies.observed(prompt.prompt, observation) if observation else []
            read.append(self._replies.prompt_ids(each.asked, index=prompt.index) if observation else prompt.token_ids)
        shared = num_shared(read)
        for each, ids in zip(group, read[1:], strict=True):
            each.prompt = replace(prompt, token_ids=ids[:shared])
            each.opening = list(ids[shared:])
            if len(each.opening) >= max_tokens:
                raise EnvironmentFailedError(
                    f"environment {self._environments.name!r}: what reset put behind the prompt of row {prompt.index} has "
                    f"{len(each.opening)} tokens, which leaves no room in max_completion_length={max_tokens}; raise it"
                )

    def _play(
        self, grown: Sequence[_Sequence], episodes: Episodes, share: slice, *, sampling: SamplingParams, seed: int
    ) -> None:
        """Lets environments and policy speak in turn until every episode has ended."""
        speaking = [place for place, each in enumerate(grown) if not each.turns[-1].truncated]
        for turn in range(1, self._max_turns + 1):
            replies = self._replies_to(
                [self._replies.heard(grown[place].messages[-1]) for place in speaking], speaking, episodes, share
            )
            if turn == self._max_turns:
                return
            told = zip(speaking, replies, strict=True)
            speaking = [place for place, reply in told if self._goes_on(grown[place], reply, sampling.max_tokens)]
            if not speaking:
                return
            self._speak([grown[place] for place in speaking], sampling, derive_seed(seed, turn))
            speaking = [place for place in speaking if not grown[place].turns[-1].truncated]

    def _replies_to(
        self, said: Sequence[str | Message], places: Sequence[int], episodes: Episodes, share: slice
    ) -> list[Reply | None]:
        """What environments say to what the policy said in some sequences; each rank asks its own."""
        own = slice(bisect_left(places, share.start), bisect_left(places, share.stop))
        told = self._world.gather(lambda: episodes.step([place - share.start for place in places[own]], said[own]))
        return [reply for part in told for reply in part]

    def _goes_on(self, each: _Sequence, reply: Reply | None, max_tokens: int) -> bool:
        """Puts what the environment said behind what the policy did, if there is anything, and room for it and an answer."""
        if reply is None:
            return False
        room = max_tokens - len(each.token_ids)
        ids = self._replies.token_ids(reply, last_token=each.turns[-1].token_ids[-1], room=room)
        each.cut = len(ids) >= room
        if each.cut:
            return False
        each.replies.append(ids)
        each.messages += reply if isinstance(reply, list) else [{"role": "user", "content": reply}]
        return True

    def _speak(self, grown: Sequence[_Sequence], sampling: SamplingParams, seed: int) -> None:
        """Has the policy answer once more, from the tokens so far."""
        so_far = [each.token_ids for each in grown]
        limits = [sampling.max_tokens - len(ids) for ids in so_far]
        answers = self._engine.generate(
            [[*each.prompt.token_ids, *ids] for each, ids in zip(grown, so_far, strict=True)],
            replace(sampling, max_tokens=max(limits)),
            num_generations=1,
            seed=seed,
            max_tokens=limits,
        )
        for each, [turn] in zip(grown, answers, strict=True):
            each.said(turn, self._replies)

    def _completions(
        self, grown: Sequence[_Sequence], episodes: Episodes, share: slice, state: TrainerState
    ) -> list[Completion]:
        """What became of the sequences, each with what its environment says of it."""
        ends = self._world.gather(lambda: list(zip(episodes.rewards(), episodes.tool_calls, strict=True)))
        played = [_episode(each, *end) for each, end in zip(grown, (end for part in ends for end in part), strict=True)]
        whole = [self._completion(each, episode) for each, episode in zip(grown, played, strict=True)]
        if not self._judges:
            return whole

        known = replace(state, is_world_process_zero=self._world.is_main)

        def judgements() -> list[tuple[Scored, ...]]:
            groups = [Group(each.prompt, [completion]) for each, completion in zip(grown[share], whole[share], strict=True)]
            loop = self._environments.loop
            said = [
                episodes.ask(f"reward function {reward.name!r}", partial(judge, reward, groups, state=known, loop=loop))
                for reward in self._judges
            ]
            return list(zip(*said, strict=True))

        told = [values for part in self._world.gather(judgements) for values in part]
        return [
            replace(completion, episode=replace(episode, judgements=values))
            for completion, episode, values in zip(whole, played, told, strict=True)
        ]

    def _completion(self, each: _Sequence, episode: Episode) -> Completion:
        logprobs = [0.0] * len(each.opening)
        versions: list[int] = []
        for turn, reply in each.parts:
            logprobs += [*turn.logprobs, *[0.0] * len(reply)]
            of_turn = turn.weight_versions or [turn.weight_version] * len(turn.token_ids)
            versions += [*of_turn, *[of_turn[-1]] * len(reply)]
        versions = [versions[0]] * len(each.opening) + versions
        token_ids, kept = tuple(each.token_ids), [turn.kept for turn in each.turns if turn.kept is not None]
        return Completion(
            token_ids=token_ids,
            logprobs=tuple(logprobs),
            finish_reason="length" if each.cut else each.turns[-1].finish_reason,
            text=self._replies.decode(token_ids[len(each.opening) :]),
            weight_version=versions[0],
            weight_versions=tuple(versions) if len(set(versions)) > 1 else (),
            kept=KeptTokens.joined(kept) if kept else None,
            episode=episode,
        )


def _episode(each: _Sequence, reward: float | None, calls: tuple[int, int] | None) -> Episode:
    sampled = [False] * len(each.opening)
    for turn, reply in each.parts:
        sampled += [True] * len(turn.token_ids) + [False] * len(reply)
    return Episode(
        sampled=tuple(sampled),
        messages=() if isinstance(each.prompt.prompt, str) else tuple(each.messages),
        num_turns=len(each.turns),
        reward=reward,
        asked=tuple(each.asked),
        num_tool_calls=None if calls is None else calls[0],
        num_tool_failures=0 if calls is None else calls[1],
    )
