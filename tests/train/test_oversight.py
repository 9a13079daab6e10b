"""What a run is told by those who watch it, and what that does to it."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from grpo_fast.config import Config
from grpo_fast.law import Forecast, OnlinePredictor, Prior, RunFacts, Spending, StoppingRule
from grpo_fast.sinks import SinkSet
from grpo_fast.train.oversight import NoRewardError, Oversight, Verdict, build_rule
from grpo_fast.train.schedule import progress_schedule

METRICS = {"reward": 0.9, "reward_std": 0.1, "frac_reward_all_wrong": 0.0, "frac_reward_zero_std": 0.0}


class Certain(OnlinePredictor):
    """Believes at every step that nothing is left to gain."""

    def observe(self, step: int, progress: float, reward: float, **told: Any) -> Forecast:
        forecast = super().observe(step, progress, reward, **told)
        sure = {"p_gain_below_eps": 0.97, "expected_gain": 0.001, "identifiable": True, "trend": 0.0, "trend_low": -0.1}
        return dataclasses.replace(forecast, **sure, phase_probabilities=(0.0, 0.0, 1.0))


class Person:
    """A sink with somebody in front of it."""

    def __init__(self, *answers: str | None) -> None:
        self.answers = list(answers)
        self.questions: list[str] = []
        self.events: list[tuple[int, str, str]] = []

    def start(self, info: Any) -> None:
        """Nothing."""

    def log_step(self, metrics: Any, forecast: Any = None) -> None:
        """Nothing."""

    def log_completions(self, rows: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    def log_event(self, step: int, event: str, message: str) -> None:
        self.events.append((step, event, message))

    def ask(self, question: str, answers: Mapping[str, str], *, give_up: Callable[[], bool]) -> str | None:
        self.questions.append(question)
        assert set(answers) == {"stop", "go on", "never"}
        assert not give_up()
        return self.answers.pop(0)


def watch(person: Person, **settings: Any) -> Oversight:
    config = Config.parse({"max_steps": 200, "forecast_min_steps": 5, "forecast_patience": 2} | settings)
    return Oversight(config, predictor=Certain(200), sinks=SinkSet([person]))


def go(oversight: Oversight, steps: range, **metrics: float) -> list[Verdict]:
    return [oversight.observe(step, step / 200, METRICS | metrics) for step in steps]


def test_stop_ends_the_run_with_the_rules_own_words() -> None:
    person = Person()
    verdicts = go(watch(person), range(1, 7))
    assert [verdict.ending is not None for verdict in verdicts] == [False] * 5 + [True]
    assert verdicts[-1].ending.kind == "forecast"
    assert verdicts[-1].ending.message == f"{verdicts[-1].decision.reason}."
    assert person.events == []


def test_warn_tells_once() -> None:
    person = Person()
    verdicts = go(watch(person, forecast="warn"), range(1, 20))
    assert all(verdict.ending is None for verdict in verdicts)
    assert [(step, event) for step, event, _ in person.events] == [(6, "warn")]
    assert "97.0%" in person.events[0][2]


def test_off_forecasts_nothing_and_still_watches_for_a_collapse() -> None:
    (verdict,) = go(watch(Person(), forecast="off"), range(1, 2))
    assert (verdict.forecast, verdict.decision, verdict.row) == (None, None, None)
    assert verdict.metrics["alarm/reward"] == 0.0
    (verdict,) = go(watch(Person(), forecast="off", collapse_action="off"), range(1, 2))
    assert (verdict.alarm, verdict.metrics) == (None, {"steps_without_variance": 0.0})


def test_ask_stops_where_that_is_the_answer() -> None:
    person = Person("stop")
    ending = go(watch(person, forecast="ask"), range(1, 7))[-1].ending
    assert ending.kind == "forecast"
    assert ending.message.endswith("; you chose to stop.")
    assert person.questions == [ending.message.removesuffix("; you chose to stop.") + ". Stop here?"]
    assert "97.0%" in person.questions[0]


@pytest.mark.parametrize(("answer", "words"), [("go on", "you chose to continue"), ("", "no answer came")])
def test_ask_remembers_for_a_tenth_of_the_budget(answer: str, words: str) -> None:
    person = Person(answer, "stop")
    verdicts = go(watch(person, forecast="ask"), range(1, 27))
    assert [verdict.ending is not None for verdict in verdicts] == [False] * 25 + [True]
    assert len(person.questions) == 2
    assert person.events[0][2].endswith(f"; {words}; the next question comes at step 26 or later")


def test_ask_takes_never_for_an_answer() -> None:
    person = Person("never")
    assert all(verdict.ending is None for verdict in go(watch(person, forecast="ask"), range(1, 150)))
    assert len(person.questions) == 1


def test_ask_without_a_terminal_warns_once_and_says_so() -> None:
    person = Person(*[None] * 20)
    verdicts = go(watch(person, forecast="ask"), range(1, 20))
    assert all(verdict.ending is None for verdict in verdicts)
    assert len(person.events) == 1
    assert person.events[0][2].endswith("; there is no terminal to ask on, so training continues")


def test_answers_outlive_a_resume() -> None:
    person = Person("go on")
    first = watch(person, forecast="ask")
    go(first, range(1, 10))
    again = watch(Person(), forecast="ask")
    again.restore(json.loads(json.dumps(first.state_dict())), progress_schedule(Config(max_steps=200)))
    again.predictor = Certain.from_state_dict(first.predictor.state_dict())
    assert all(verdict.ending is None for verdict in go(again, range(10, 26))), "a question would fail: nobody answers"
    assert again.state_dict()["silent_until"] == 26


FALL = [0.8 + 0.02 * (1 if step % 4 < 2 else -1) for step in range(42)] + [0.1] * 8


def collapse(oversight: Oversight) -> list[Verdict]:
    return [oversight.observe(step, step / 200, METRICS | {"reward": value}) for step, value in enumerate(FALL, 1)]


def test_a_collapse_ends_the_run() -> None:
    verdicts = collapse(watch(Person(), forecast="off"))
    (found,) = [verdict for verdict in verdicts if verdict.ending is not None]
    assert found.ending.kind == "collapse"
    assert found.ending.message.startswith("The policy is collapsing: the reward fell from ")
    assert found.alarm.onset == 43


def test_what_is_sound_is_known_at_each_step_and_after_a_resume() -> None:
    oversight = watch(Person(), forecast="off", collapse_action="warn")
    assert (oversight.collapsed, oversight.sound_until(0)) == (False, -1)
    for step, value in enumerate(FALL, 1):
        alarm = oversight.observe(step, step / 200, METRICS | {"reward": value}).alarm
        resumed = watch(Person(), forecast="off", collapse_action="warn")
        resumed.restore(json.loads(json.dumps(oversight.state_dict())), progress_schedule(Config(max_steps=200)))
        for each in (oversight, resumed):
            assert each.collapsed == alarm.confirmed
            assert each.sound_until(step) == (step if alarm.onset is None else alarm.onset - 1) - 1
        if alarm.confirmed:
            assert oversight.sound_until(step) == 41
            return
    pytest.fail("no collapse was confirmed")


def test_a_collapse_is_only_told_where_that_is_asked_for() -> None:
    person = Person()
    verdicts = collapse(watch(person, forecast="off", collapse_action="warn"))
    assert all(verdict.ending is None for verdict in verdicts)
    assert [event for _, event, _ in person.events] == ["warn"]
    assert person.events[0][2].endswith("; training continues (collapse_action='warn')")


def test_a_collapse_goes_before_a_plateau() -> None:
    oversight = watch(Person(), forecast_min_steps=49, forecast_patience=1)
    kinds = [verdict.ending.kind for verdict in collapse(oversight) if verdict.ending is not None]
    assert kinds[0] == "collapse"


def test_the_row_holds_what_the_rule_made_of_the_forecast() -> None:
    verdicts = go(watch(Person()), range(1, 7))
    assert {key: verdicts[3].row[key] for key in ("stop", "stop_count", "veto")} == {
        "stop": False,
        "stop_count": 0,
        "veto": "min_steps",
    }
    assert (verdicts[5].row["stop"], verdicts[5].row["stop_count"]) == (True, 2)
    json.dumps(verdicts[5].row, allow_nan=False)


def test_a_probe_is_where_the_forecast_starts() -> None:
    config = Config.parse({"max_steps": 200})
    facts = RunFacts(size_b=0.5)
    oversight = Oversight(config, predictor=OnlinePredictor(200, reward_range=(0, 1), facts=facts), sinks=SinkSet([]))
    blank = oversight.predictor.forecast()
    oversight.start_from(0.35, 0.02)
    assert oversight.predictor.facts == RunFacts(size_b=0.5, start=0.35, start_error=0.02)
    assert oversight.predictor.forecast().band.median[0] == pytest.approx(0.35, abs=0.01)
    assert blank.band.high[0] - blank.band.low[0] > 0.3
    oversight.start_from(0.9, 0.02)
    assert oversight.predictor.facts.start == 0.35, "what is known already is kept"
    silent = Oversight(config, predictor=OnlinePredictor(200), sinks=SinkSet([]))
    silent.start_from(math.nan, math.nan)
    assert silent.predictor.facts == RunFacts()


def test_what_was_spent_reaches_the_forecast() -> None:
    oversight = Oversight(Config.parse({"max_steps": 200}), predictor=OnlinePredictor(200), sinks=SinkSet([]))
    for step in (1, 2, 3, 4):
        verdict = oversight.observe(step, step / 200, METRICS, spent=Spending(1000.0 * step, 0.25 * step, 0.5 * step))
    assert verdict.row["end_spending"] == {"tokens": 200_000.0, "device_hours": 50.0, "money": 100.0}


def test_wrong_groups_reach_the_rule() -> None:
    verdicts = go(watch(Person()), range(1, 10), frac_reward_all_wrong=0.7)
    assert {verdict.decision.veto for verdict in verdicts[4:]} == {"all wrong"}


def test_steps_that_teach_nothing_are_counted_told_and_reach_the_rule() -> None:
    person = Person()
    config = Config.parse({"max_steps": 200, "forecast_patience": 3})
    oversight = Oversight(config, predictor=OnlinePredictor(200), sinks=SinkSet([person]))

    def rise(steps: range, zero_std: float) -> list[Verdict]:  # of which no forecast is sure
        rows = (METRICS | {"reward": step / 200, "frac_reward_zero_std": zero_std} for step in steps)
        return [oversight.observe(step, step / 200, row) for step, row in zip(steps, rows, strict=True)]

    rise(range(1, 11), 1.0)
    (verdict,) = rise(range(11, 12), 0.9)
    assert (verdict.still, verdict.metrics["steps_without_variance"]) == (0, 0.0)
    verdicts = rise(range(12, 34), 1.0)
    assert verdicts[-1].metrics["steps_without_variance"] == 22.0
    ((step, kind, message),) = person.events
    assert (step, kind) == (31, "warn")
    assert "In 20 steps no group held two different rewards: nothing was learnt. The prompts are solved, the" in message
    assert verdicts[-1].ending.kind == "forecast"
    assert "so nothing was learnt" in verdicts[-1].ending.message
    assert all(verdict.ending is None for verdict in verdicts[:-1])


def test_steps_without_a_right_answer_are_told_as_such_and_stop_nothing() -> None:
    person = Person()
    verdicts = go(watch(person), range(1, 41), reward=0.0, frac_reward_zero_std=1.0, frac_reward_all_wrong=1.0)
    ((step, _, message),) = person.events
    assert step == 20
    assert "no completion earned anything. Easier prompts" in message
    assert not any(verdict.ending for verdict in verdicts)


@pytest.mark.parametrize("also", [{"beta": 0.01}, {"entropy_coef": 0.001}])
def test_what_else_is_learnt_from_needs_no_different_rewards(also: dict[str, float]) -> None:
    person = Person()
    verdicts = go(watch(person, forecast="off", **also), range(1, 31), frac_reward_zero_std=1.0)
    assert ({verdict.still for verdict in verdicts}, person.events) == ({0}, [])


def test_the_rule_is_the_configurations() -> None:
    worth = {"forecast_reward_value": 3.0, "price_per_gpu_hour": 2.0}
    rule = build_rule(Config(max_steps=100, warmup_steps=0.25, forecast_confidence=0.7, forecast_patience=5, **worth))
    assert (rule.warmup_steps, rule.confidence, rule.patience, rule.reward_value) == (25, 0.7, 5, 3.0)
    assert build_rule(Config()).patience == StoppingRule().patience
    assert build_rule(Config()).confidence == StoppingRule().confidence


def test_the_law_comes_back_or_is_fed_anew_for_another_horizon() -> None:
    def make(prior: Prior | None = None, **settings: Any) -> Oversight:
        config = Config.parse({"max_steps": 20, "lr_scheduler_type": "linear"} | settings)
        return Oversight(config, predictor=OnlinePredictor(config.max_steps, prior=prior), sinks=SinkSet([]))

    first = make()
    first.start_from(0.02, 0.01)
    progress = progress_schedule(Config(max_steps=20, lr_scheduler_type="linear"))
    for step in (1, 2, 3, 4):
        reward = math.nan if step == 2 else step / 20
        metrics = {"reward": reward, "reward_std": 0.3 / step, "frac_reward_all_wrong": 0.5, "frac_reward_zero_std": 1.0}
        first.observe(step, progress[step - 1], metrics)
    first.rule.count = 2
    state = json.loads(json.dumps(first.state_dict()))

    same = make()
    same.restore(state, progress)
    assert same.state_dict() == first.state_dict()
    assert same.rule.count == 2
    assert same.observe(5, progress[4], metrics).still == 5

    longer = make(max_steps=40)
    further = progress_schedule(Config(max_steps=40, lr_scheduler_type="linear"))
    longer.restore(state, further)
    assert longer.predictor.horizon == 40
    seen = [(row.step, row.progress, row.reward) for row in longer.predictor.rows]
    assert seen == [(s, further[s - 1], s / 20) for s in (1, 3, 4)]
    assert [row.reward_std for row in longer.predictor.rows] == [row.reward_std for row in first.predictor.rows]
    assert longer.predictor.facts == first.predictor.facts

    other = make(prior=dataclasses.replace(Prior.default(), drift_median=0.2))
    other.restore(state, progress)
    assert other.predictor.prior.drift_median == 0.2
    assert other.predictor.rows == first.predictor.rows
    assert other.predictor.forecast() != first.predictor.forecast()

    shorter = make(max_steps=3)
    shorter.restore(state, progress_schedule(Config(max_steps=3)))
    assert shorter.predictor.num_observations == 2


def test_many_steps_without_a_reward_are_a_failure_that_a_resumed_run_counts_on() -> None:
    config = Config(forecast="off", collapse_action="off")
    none = METRICS | {"reward": math.nan, "rewards/a/mean": math.nan, "rewards/b/mean": math.nan, "rewards/b/std": math.nan}

    def observer() -> Oversight:
        return Oversight(config, predictor=OnlinePredictor(100), sinks=SinkSet([]))

    first = observer()
    assert [first.observe(step, 0.1, none).failure for step in range(1, 8)] == [None] * 7
    assert first.observe(8, 0.1, METRICS).failure is None
    assert [first.observe(step, 0.1, none).failure for step in range(9, 18)] == [None] * 9
    second = observer()
    second.restore(json.loads(json.dumps(first.state_dict())), [0.1] * 100)
    failure = pickle.loads(pickle.dumps(second.observe(18, 0.1, none).failure))
    assert isinstance(failure, NoRewardError)
    assert str(failure).startswith(
        "reward function 'a, b' gave None or NaN, or failed, for every completion of the 10 steps up to"
    )
