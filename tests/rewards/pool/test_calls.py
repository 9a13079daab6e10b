from __future__ import annotations

import functools
import math
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.rewards import RewardError, RewardPool
from grpo_fast.rewards import process as process_module
from grpo_fast.types import TrainerState
from tests.rewards.pool.groups import Factory, group


def by_length() -> Any:
    """A closure: test modules cannot be imported in a worker, so what is tested there is sent by value."""
    bonus = 0.5
    return lambda completions: [len(text) + bonus for text in completions]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_groups_are_filled_in_order(make_pool: Factory, workers: int) -> None:
    def level_of(level: list[int]) -> list[float]:
        return [float(value) for value in level]

    groups = [group("a", "bb", level=1), group("ccc", level=2), group("dddd", "", level=3), group("e", level=4)]
    report = make_pool(by_length(), level_of, weights=[1.0, 10.0], workers=workers).score(groups)
    assert [g.rewards for g in groups] == [[[1.5, 1.0], [2.5, 1.0]], [[3.5, 2.0]], [[4.5, 3.0], [0.5, 3.0]], [[1.5, 4.0]]]
    assert [g.reward for g in groups] == [[11.5, 12.5], [23.5], [34.5, 30.5], [41.5]]
    assert report.mean == {"<lambda>": pytest.approx(14 / 6), "level_of": pytest.approx(14 / 6)}
    assert report.restarts == 0
    assert report.problems == ()


@pytest.mark.parametrize("workers", [0, 1])
def test_none_leaves_a_function_out(make_pool: Factory, workers: int) -> None:
    def some(completions: list[str]) -> list[float | None]:
        return [None if text == "skip" else 1.0 for text in completions]

    def fewer(completions: list[str]) -> list[float | None]:
        return [float("nan") if text else 2.0 for text in completions]

    scored = group("", "skip", "x")
    report = make_pool(some, fewer, workers=workers).score([scored])
    assert scored.reward[0] == 3.0
    assert math.isnan(scored.reward[1])
    assert scored.reward[2] == 1.0
    assert report.nones == {"some": 1, "fewer": 2}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise KeyError('lost')", r"reward function 'bad' raised KeyError: 'lost' \(.*in bad"),
        ("return [1.0]", "reward function 'bad' returned 1 values for 2 completions"),
        ("return ['1', '2']", r"reward function 'bad' returned '1' \(str\) for completion 0"),
        ("return [1.0, float('inf')]", "reward function 'bad' returned inf .float. for completion 1"),
        ("return None", "reward function 'bad' returned None"),
    ],
)
def test_a_failed_call_is_an_error_or_a_counted_none(make_pool: Factory, workers: int, source: str, message: str) -> None:
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(f"def bad(completions):\n    {source}\n", space)
    scored = group("a", "bb")
    with pytest.raises(RewardError, match=message) as caught:
        make_pool(space["bad"], by_length(), workers=workers).score([scored])
    assert caught.value.function == "bad"
    assert scored.reward == []
    report = make_pool(space["bad"], by_length(), workers=workers, on_error="none").score([scored])
    assert scored.reward == [1.5, 2.5]
    assert report.errors == {"bad": 1, "<lambda>": 0}
    assert report.nones == {"bad": 2, "<lambda>": 0}
    assert len(report.problems) == 1
    assert report.metrics()["rewards/bad/errors"] == 1


def test_the_traceback_of_the_worker_is_kept(make_pool: Factory) -> None:
    def bad() -> None:
        raise LookupError("here")

    with pytest.raises(RewardError) as caught:
        make_pool(bad).score([group("a")])
    assert "Traceback" in caught.value.worker_traceback
    assert "LookupError: here" in caught.value.worker_traceback


def test_an_endless_message_is_cut_and_its_traceback_kept(make_pool: Factory) -> None:
    def bad() -> None:
        raise LookupError("x" * 3_000_000)

    with pytest.raises(RewardError) as caught:
        make_pool(bad).score([group("a")])
    assert len(str(caught.value)) < 2000
    assert len(caught.value.worker_traceback) > 3_000_000


def hang_on(word: str, how: str = "sleep") -> Any:
    def hangs(completions: list[str]) -> list[float]:
        if word in completions:
            if how == "sleep":
                time.sleep(600)
            import re

            re.match(r"(a+)+$", "a" * 60 + "b")
        return [1.0] * len(completions)

    return hangs


@pytest.mark.parametrize("how", ["sleep", "in C code"])
def test_a_call_that_hangs_is_killed_and_the_pool_goes_on(make_pool: Factory, how: str) -> None:
    pool = make_pool(hang_on("hang", how), timeout_s=1.0)
    pool.start()
    [first] = pool.process_ids
    begin = time.monotonic()
    with pytest.raises(RewardError, match="'hangs' took longer than 1 s for 2 completions"):
        pool.score([group("hang", "x")])
    assert time.monotonic() - begin < 30
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    scored = group("fine")
    assert pool.score([scored]).timeouts == {"hangs": 0}
    assert scored.reward == [1.0]
    assert pool.process_ids != [first]


def test_a_call_that_hangs_can_be_counted(make_pool: Factory) -> None:
    groups = [group("hang", "x"), group("fine", "y")]
    pool = make_pool(hang_on("hang"), by_length(), timeout_s=2.0, workers=2, on_error="none")
    report = pool.score(groups)
    assert report.timeouts == {"hangs": 1, "<lambda>": 0}
    assert report.restarts == 1
    assert report.nones == {"hangs": 2, "<lambda>": 0}
    assert groups[0].reward == [4.5, 1.5]
    assert groups[1].reward == [5.5, 2.5]
    assert report.metrics()["rewards/hangs/timeouts"] == 1


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (lambda: os._exit(7), "'dies' ended its worker process with exit code 7"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "'dies' ended its worker process by SIGSEGV"),
    ],
)
def test_a_worker_that_dies_is_noticed_at_once(make_pool: Factory, end: Any, message: str) -> None:
    def dies(completions: list[str]) -> list[float]:
        if "die" in completions:
            end()
        return [1.0]

    pool = make_pool(dies, timeout_s=60.0)
    pool.start()
    begin = time.monotonic()
    with pytest.raises(RewardError, match=message):
        pool.score([group("die")])
    assert time.monotonic() - begin < 50
    counted = make_pool(dies, timeout_s=60.0, on_error="none").score([group("die")])
    assert (counted.errors["dies"], counted.restarts, counted.nones["dies"]) == (1, 1, 1)
    scored = group("live")
    pool.score([scored])
    assert scored.reward == [1.0]


def test_a_worker_lost_between_two_steps_is_replaced(make_pool: Factory) -> None:
    pool = make_pool(by_length())
    pool.score([group("a")])
    [lost] = pool.process_ids
    os.kill(lost, signal.SIGKILL)
    os.waitid(os.P_PID, lost, os.WEXITED | os.WNOWAIT)
    scored = group("abc")
    report = pool.score([scored])
    assert scored.reward == [3.5]
    assert report.restarts == 1
    assert report.errors == {"<lambda>": 0}


def test_a_worker_that_never_lives_to_be_called(make_pool: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = process_module.WorkerProcess.submit

    def ended_first(worker: Any, functions: list[int], arguments: bytes, *, timeout_s: float) -> None:
        os.kill(worker.process_id, signal.SIGKILL)
        os.waitid(os.P_PID, worker.process_id, os.WEXITED | os.WNOWAIT)
        submit(worker, functions, arguments, timeout_s=timeout_s)

    monkeypatch.setattr(process_module.WorkerProcess, "submit", ended_first)
    with pytest.raises(RewardError, match=r"SIGKILL.*before it was called, 3 times running"):
        make_pool(by_length()).score([group("a")])


def test_a_worker_that_does_not_read(make_pool: Factory) -> None:
    pool = make_pool(by_length(), timeout_s=0.5, on_error="none")
    pool.start()
    os.kill(pool.process_ids[0], signal.SIGSTOP)
    report = pool.score([group("a", blob="a" * 10_000_000)])
    assert report.timeouts == {"<lambda>": 1}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_functions_log_comes_back(make_pool: Factory, workers: int) -> None:
    def counts(completions: list[str], log_metric: Any, **columns: Any) -> list[float]:
        log_metric("share of a", sum("a" in text for text in completions) / len(completions))
        columns["log_extra"]("letters", [len(text) for text in completions])
        return [columns["trainer_state"].global_step] * len(completions)

    async def judges(completions: list[str], log_extra: Any) -> list[float]:
        log_extra("letters", [f"{len(text)} letters" for text in completions])
        return [0.0] * len(completions)

    groups = [group("a", "b", "a"), group("bb"), group("a"), group("ccc", "a", "b")]
    pool = make_pool(counts, judges, workers=workers)
    report = pool.score(groups, TrainerState(global_step=7))
    assert report.logged == {"share of a": pytest.approx(4 / 8)}
    assert [each.reward for each in groups] == [[7.0] * 3, [7.0], [7.0], [7.0] * 3]
    assert [each.extra["letters"] for each in groups] == [[1, 1, 1], [2], [1], [3, 1, 1]]
    assert groups[3].extra["judges/letters"] == ["3 letters", "1 letters", "1 letters"]
    again = pool.score([group("a")])
    assert again.logged == {"share of a": 1.0}, "a step has its own"


def test_functions_run_side_by_side(make_pool: Factory, tmp_path: Path) -> None:
    def meet(mine: str, other: str) -> Any:
        def waits(completions: list[str]) -> list[float]:
            (tmp_path / mine).touch()
            while not (tmp_path / other).exists():
                time.sleep(0.01)
            return [1.0]

        return waits

    scored = group("a")
    pool = make_pool(meet("one", "two"), meet("two", "one"), workers=2)
    pool.score([scored])
    assert len(pool.process_ids) == 2
    assert scored.reward == [2.0]


def test_module_function_from_a_file_on_the_path(make_pool: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards_for_pool.py").write_text(
        "def short(completions, **columns):\n    return [-len(t) for t in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    scored = group("abc")
    report = make_pool("my_rewards_for_pool:short").score([scored])
    assert scored.reward == [-3.0]
    assert list(report.metrics()) == ["rewards/short/mean", "rewards/short/std"]
    assert "my_rewards_for_pool" not in sys.modules


@pytest.mark.parametrize("workers", [0, 2])
def test_a_name_that_cannot_be_resolved_is_known_at_the_start(make_pool: Factory, workers: int) -> None:
    pool = make_pool("absent_module:f", workers=workers, on_error="none")
    for attempt in (pool.start, lambda: pool.score([group("a")])):
        with pytest.raises(ValueError, match="cannot import 'absent_module'"):
            attempt()
    assert pool.process_ids == []


def test_a_module_that_ends_its_process_on_import(make_pool: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fatal_for_pool.py").write_text("import os\nos._exit(5)\n")
    (tmp_path / "hanging_for_pool.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match="'f' ended its worker process with exit code 5 while it was loaded"):
        make_pool("fatal_for_pool:f", on_error="none").start()
    monkeypatch.setattr(process_module, "START_TIMEOUT_S", 1.0)
    with pytest.raises(RewardError, match="could not be loaded in time"):
        make_pool("hanging_for_pool:f", on_error="none").start()


def test_an_unpicklable_function_and_column(make_pool: Factory) -> None:
    lock = threading.Lock()

    def holds(completions: list[str]) -> list[float]:
        with lock:
            return [1.0] * len(completions)

    with pytest.raises(TypeError, match="reward function 'holds' cannot be sent to a worker process"):
        make_pool(holds)
    scored = group("a", lock=lock)
    make_pool(holds, workers=0).score([scored])
    assert scored.reward == [1.0]
    with pytest.raises(TypeError, match="column 'lock' cannot be sent"):
        make_pool(by_length()).score([scored])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0, 2.0]}, "are 2 for 1 reward functions"),
        ({"weights": [math.nan]}, "must be finite"),
        ({"timeout_s": 0.0}, "timeout_s=0.0"),
        ({"timeout_s": math.inf}, "timeout_s=inf"),
        ({"workers": -1}, "workers=-1"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardPool(["format"], **options)


@pytest.mark.parametrize("reward_funcs", [[], "accuracy"])
def test_a_list_of_rewards_is_needed(reward_funcs: Any) -> None:
    with pytest.raises(ValueError, match="must be a list with at least one"):
        RewardPool(reward_funcs)


def test_start_without_workers_resolves_here(make_pool: Factory) -> None:
    pool = make_pool("format", workers=0)
    pool.start()
    assert pool.process_ids == []


def test_repeated_names_stay_apart(make_pool: Factory) -> None:
    pool = make_pool(by_length(), by_length(), "format", by_length())
    assert pool.names == ["<lambda>", "<lambda>_2", "format", "<lambda>_3"]


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_to_score(make_pool: Factory, workers: int) -> None:
    pool = make_pool("format", workers=workers)
    assert math.isnan(pool.score([]).mean["format"])
    empty = group()
    pool.score([empty])
    assert empty.reward == []
    assert pool.process_ids == []


def test_close_ends_every_worker_and_can_be_repeated() -> None:
    with RewardPool(["format"], workers=2) as pool:
        pool.start()
        ids = pool.process_ids
        assert len(ids) == 2
    pool.close()
    for process_id in ids:
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)
    for use in (pool.start, lambda: pool.score([group("a")])):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_an_interrupt_leaves_a_usable_pool(make_pool: Factory, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    # A test run that was started in the background ignores SIGINT.
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    called = tmp_path / "called"

    def hangs(completions: list[str]) -> list[float]:
        if "hang" in completions:
            called.touch()
            time.sleep(600)
        return [1.0]

    def interrupt() -> None:
        while not called.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    pool = make_pool(hangs, timeout_s=60.0)
    pool.start()
    person = threading.Thread(target=interrupt, daemon=True)
    person.start()
    with pytest.raises(KeyboardInterrupt):
        pool.score([group("hang")])
    person.join()
    scored = group("fine")
    pool.score([scored])
    assert scored.reward == [1.0]


def test_a_script_without_main_guard_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        textwrap.dedent(
            """
            print("top level")
            from dataclasses import dataclass
            from grpo_fast.rewards import RewardPool
            from grpo_fast.types import Completion, Group, Prompt

            SCALE = 3

            @dataclass
            class Scorer:
                offset: float

                def __call__(self, completions, **columns):
                    return [helper(text) + self.offset for text in completions]

            def helper(text):
                return SCALE * len(text)

            def plain(completions, answer):
                return [float(text == right) for text, right in zip(completions, answer)]

            completions = [Completion((1,), (0.0,), "stop", text) for text in ("ab", "c")]
            group = Group(Prompt(0, "p", (1,), {"answer": "ab"}), completions)
            pool = RewardPool([Scorer(0.5), plain], workers=2)
            pool.score([group])
            print(pool.names, group.rewards)
            """
        )
    )
    done = subprocess.run([sys.executable, "-W", "error", str(script)], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "top level\n['Scorer', 'plain'] [[6.5, 1.0], [3.5, 0.0]]\n"


def test_a_thousand_completions_of_mathematics(make_pool: Factory) -> None:
    groups = [
        group(*(f"Adding up, we get \\boxed{{{index + extra}}}." for extra in range(8)), index=index, answer=f"#### {index}")
        for index in range(125)
    ]
    pool = make_pool("accuracy", "exact_match")
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = pool.score(groups)
    pool.close()
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime < 20, "seconds of its worker's core"
    assert report.mean == {"accuracy": 1 / 8, "exact_match": 1 / 8}


def test_rewards_import_no_torch(imported_by: Callable[[str], set[str]]) -> None:
    assert not {"torch", "math_verify"} & imported_by("import grpo_fast.rewards")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exit_is_a_failed_call(make_pool: Factory, workers: int) -> None:
    def leaves(completions: list[str]) -> list[float]:
        sys.exit(0)

    async def leaves_later(completions: list[str]) -> list[float]:
        sys.exit(0)

    pool = make_pool(leaves, leaves_later, workers=workers, on_error="none")
    report = pool.score([group("a")])
    assert (report.errors, report.restarts) == ({"leaves": 1, "leaves_later": 1}, 0)
    assert all("raised SystemExit: 0" in problem for problem in report.problems)


def test_a_column_with_the_name_of_an_argument_is_refused_at_the_start(make_pool: Factory) -> None:
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"the dataset column 'prompts' has the name of an argument .*; rename it"):
            make_pool(lambda completions: [1.0] * len(completions), workers=workers).start(["answer", "prompts"])
