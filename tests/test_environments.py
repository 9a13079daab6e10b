from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_fast.environments import EnvironmentFailedError, Environments
from grpo_fast.tools import NoEnvironment
from grpo_fast.types import Prompt
from tests.test_tools import Guessing, add

CHAT = [{"role": "user", "content": "q"}]


def prompts(*given: Any, **columns: Any) -> list[Prompt]:
    return [Prompt(7 + place, prompt, (1,), columns) for place, prompt in enumerate(given)]


class Counting:
    """Answers with how often it was spoken to, twice."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1

    def reset(self, prompt: Any, answer: str = "") -> None:
        self.prompt, self.answer, self.heard = prompt, answer, list[str]()

    def step(self, completion: str) -> str | None:
        self.heard.append(completion)
        return f"{len(self.heard)} of {self.answer}" if len(self.heard) < 3 else None

    def get_reward(self) -> float:
        return len(self.heard) / 2


@pytest.fixture
def counting() -> type[Counting]:
    return type("Fresh", (Counting,), {"made": 0})


def saying(answer: Any, **methods: Callable[..., Any]) -> type:
    """A class whose ``step`` gives always the same."""
    return type("Saying", (), {"reset": lambda self, prompt: None, "step": lambda self, text: answer, **methods})


def test_episodes_run_side_by_side_and_instances_are_used_again(counting: type[Counting]) -> None:
    with Environments(counting) as environments:
        assert environments.can_rate
        environments.check_columns(["answer", "level"])
        for _ in range(3):
            with environments.begin(prompts("p", "q", CHAT, answer="x")) as episodes:
                assert episodes.step([0, 2], ["a", "b"]) == ["1 of x", [{"role": "user", "content": "1 of x"}]]
                assert episodes.step([2, 1], ["c", "d"]) == [[{"role": "user", "content": "2 of x"}], "1 of x"]
                assert episodes.step([2], ["e"]) == [None]
                assert episodes.rewards() == [0.5, 0.5, 1.5]
        assert counting.made == 3, "one at the start, two more for three episodes at a time"
        with environments.begin(prompts("p")), environments.begin(prompts("p", "p", "p")):
            pass
        assert counting.made == 4, "episodes that overlap do not share"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_calls_run_at_a_time_and_may_be_async(asynchronous: bool) -> None:
    """Async ones on one loop, from call to call: what an environment keeps, as a connection, may be bound to it."""
    together, awaited = threading.Barrier(4), asyncio.Barrier(4)

    class Waiting:
        def reset(self, prompt: str) -> None: ...

        def step(self, completion: str) -> str:
            together.wait(timeout=20)
            return completion.upper()

    class Async:
        async def reset(self, prompt: str) -> None:
            self.loop = asyncio.get_running_loop()

        async def step(self, completion: str) -> str:
            assert self.loop is asyncio.get_running_loop()
            await awaited.wait()
            return completion.upper()

    kind = Async if asynchronous else Waiting
    with Environments(kind, workers=4) as environments, environments.begin(prompts(*"abcd")) as episodes:
        assert not environments.can_rate
        assert episodes.step(range(4), list("wxyz")) == list("WXYZ")
        assert episodes.rewards() == [None] * 4


def test_messages_may_be_several() -> None:
    tool = {"role": "tool", "content": "42"}
    for answer, expected in ((tool, [tool]), ([tool, "go on"], [tool, {"role": "user", "content": "go on"}])):
        with Environments(saying(answer)) as environments, environments.begin(prompts(CHAT)) as episodes:
            assert episodes.step([0], ["x"]) == [expected]


@pytest.mark.parametrize(
    ("prompt", "answer", "told"),
    [
        ("p", "", r"step returned '' \(str\) for row 7; it must return text, as the prompt is, or None"),
        ("p", {"role": "tool", "content": "4"}, "must return text, as the prompt is"),
        ("p", 3, r"step returned 3 \(int\)"),
        (CHAT, "", "must return text or messages like"),
        (CHAT, {"content": "no role"}, "must return text or messages like"),
        (CHAT, [], "must return text or messages like"),
        (CHAT, (1.0, True), "must return text or messages like"),
    ],
)
def test_answers_that_cannot_be_read(prompt: Any, answer: Any, told: str) -> None:
    with Environments(saying(answer)) as environments:
        episodes = environments.begin(prompts(prompt))
        with pytest.raises(EnvironmentFailedError, match=told):
            episodes.step([0], ["x"])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((1, 1.0), (None, None), (np.array([0.5]), 0.5), (True, 1.0)),
        *(("1", "'1'"), (math.nan, "nan"), (np.zeros(2), "array"), (10**400, "10000"), (-1e39, r"-1e\+39")),
    ],
)
def test_rewards_are_numbers(value: Any, expected: Any) -> None:
    with Environments(saying(None, get_reward=lambda self: value)) as environments:
        episodes = environments.begin(prompts("p"))
        if isinstance(expected, str):
            with pytest.raises(EnvironmentFailedError, match=rf"get_reward returned {expected}.*finite number or None"):
                episodes.rewards()
        else:
            assert episodes.rewards() == [expected]


def test_what_fails_is_named_with_its_row() -> None:
    def broken(self: Any, text: str) -> str:
        raise KeyError("no such page")

    with Environments(saying(None, step=broken)) as environments:
        episodes = environments.begin(prompts("p", "q"))
        with pytest.raises(EnvironmentFailedError, match=r"'Saying': step raised KeyError: 'no such page' \(.*for row 8"):
            episodes.step([1], ["x"])
    with (
        Environments(saying(None, reset=lambda self, prompt: "hello")) as environments,
        pytest.raises(EnvironmentFailedError, match=r"reset returned 'hello'.*it must return None"),
    ):
        environments.begin(prompts("p"))


def test_what_hangs_is_named_with_its_row_and_does_not_come_back() -> None:
    released = threading.Event()

    class Hanging:
        def reset(self, prompt: str) -> None:
            self.prompt = prompt

        def step(self, completion: str) -> str:
            if self.prompt == "hang":
                released.wait(60)
            return "done"

    with Environments(Hanging, timeout_s=1.0, workers=2) as environments:
        episodes = environments.begin(prompts("a", "hang", "b"))
        begin = time.monotonic()
        with pytest.raises(EnvironmentFailedError, match=r"step took longer than 1 s for row 8 \(environment_timeout_s\)"):
            episodes.step([0, 1, 2], ["x"] * 3)
        assert time.monotonic() - begin < 30
        with environments.begin(prompts("a", "b")) as episodes:
            assert episodes.step([0, 1], ["x"] * 2) == ["done"] * 2
    released.set()


def test_async_code_that_blocks_the_others_is_named() -> None:
    released = threading.Event()

    class Blocking:
        def reset(self, prompt: str) -> None: ...

        async def step(self, completion: str) -> None:
            released.wait(60)

    with Environments(Blocking, timeout_s=0.5) as environments, environments.begin(prompts("p", "q")) as episodes:
        with pytest.raises(
            EnvironmentFailedError,
            match=r"step took longer than 0.5 s for row [78, ]+ .*; async code blocks the event loop that all share, at "
            r".*test_environments.py:\d+, in step: released.wait\(60\): what blocks belongs in asyncio.to_thread",
        ):
            episodes.step([0, 1], ["x", "y"])
        released.set()


def test_a_call_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import time\nfrom grpo_fast.environments import Environments\nfrom grpo_fast.types import Prompt\n"
        "class Hanging:\n    def reset(self, prompt): time.sleep(600)\n    def step(self, completion): ...\n"
        "made = Environments(Hanging, timeout_s=0.2)\nmade.start()\n"
        "try:\n    made.begin([Prompt(0, 'p', (1,))])\nfinally:\n    made.close()\n"
    )
    ended = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "reset took longer than 0.2 s for row 0" in ended.stderr


def test_closing_closes_all_environments_that_can_be_also_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    closed: list[int] = []

    def close(self: Any) -> None:
        closed.append(1)
        if len(closed) == 3:
            raise OSError("the sandbox is gone")

    def step(self: Any, text: str) -> None:
        raise KeyError(text)

    with Environments(saying(None, close=close, step=step)) as environments:
        with environments.begin(prompts("p", "q")):
            assert closed == []
        with pytest.raises(EnvironmentFailedError), environments.begin(prompts("p", "q", "r")) as episodes:
            episodes.step([0], ["x"])
    assert closed == [1, 1, 1]
    assert "environment 'Saying': close raised OSError: the sandbox is gone" in caplog.text


def test_what_was_made_is_closed_though_another_could_not_be() -> None:
    closed: list[int] = []

    class Sandbox:
        made = 0

        def __init__(self) -> None:
            type(self).made += 1
            if type(self).made == 3:
                raise OSError("no more sandboxes")

        def reset(self, prompt: str) -> None: ...

        def step(self, completion: str) -> None: ...

        def close(self) -> None:
            closed.append(1)

    with (
        Environments(Sandbox, workers=1) as environments,
        pytest.raises(EnvironmentFailedError, match="no more sandboxes"),
        environments.begin(prompts("p", "q", "r")),
    ):
        raise AssertionError
    assert closed == [1, 1]
    with pytest.raises(ValueError, match="tools add are given beside"):
        Environments(saying(None, close=lambda self: closed.append(2)), tools={"add": add}).start()
    assert closed == [1, 1, 2]


@pytest.mark.parametrize("kind", [Counting, Guessing])
def test_one_instance_does_not_play_two_episodes_at_a_time(kind: type) -> None:
    shared = kind()
    with Environments(lambda: shared) as environments:
        asked = prompts(CHAT, secret="tea")
        for _ in range(2):
            with environments.begin(asked):
                pass
        with pytest.raises(
            EnvironmentFailedError, match=r"is one instance, which .* give the class, or a function that makes a"
        ):
            environments.begin([*asked, *asked])


def test_what_an_environment_does_to_its_columns_is_not_done_to_the_dataset() -> None:
    class Board:
        def reset(self, prompt: list[dict[str, str]], **columns: Any) -> None:
            self.board, self.prompt = columns["board"], prompt

        def step(self, completion: str) -> str:
            self.board.append(completion)
            self.prompt[0]["content"] += completion
            return str(self.board)

    asked = prompts([{"role": "user", "content": "q"}], board=[[0]]) * 2
    with Environments(Board) as environments:
        for _ in range(2):
            with environments.begin(asked) as episodes:
                found = episodes.step([0, 1], ["a", "b"])
                assert [reply[0]["content"] for reply in found if isinstance(reply, list)] == ["[[0], 'a']", "[[0], 'b']"]
    assert asked == prompts(CHAT, board=[[0]]) * 2


def test_environments_are_made_side_by_side_and_what_fails_in_that_ends_a_run_with_a_checkpoint() -> None:
    together, made = threading.Barrier(3), []

    class Slow:
        def __init__(self) -> None:
            made.append(1)
            if len(made) > 1:
                together.wait(timeout=20)
            if len(made) > 4:
                raise OSError("no more sandboxes")

        def reset(self, prompt: str) -> None: ...

        def step(self, completion: str) -> None: ...

    with Environments(Slow, workers=3) as environments:
        with environments.begin(prompts("a", "b", "c", "d")):
            pass
        with pytest.raises(EnvironmentFailedError, match=r"'Slow': making it raised OSError: no more sandboxes .* for row \d+"):
            environments.begin(prompts(*"abcdefg"))


def test_what_is_no_environment_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brought_games.py").write_text(
        "class Game:\n    def reset(self, prompt, level): ...\n    def step(self, completion): ...\n"
        "class Tools:\n    def reset(self): ...\n    def add(self, a: int, b: int) -> int: ...\n"
        "class Deaf:\n    def reset(self): ...\n"
        "class Broken:\n    def __init__(self): self.page = {}['start']\nnumber = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def start(factory: Any) -> Environments:
        environments = Environments(factory)
        environments.start()
        return environments

    with pytest.raises(ValueError, match="environment 'Game': reset needs a dataset column 'level'; the dataset has answer"):
        start("brought_games:Game").check_columns(["answer"])
    with pytest.raises(ValueError, match=r"'Tools' has no method 'step', so .* tool 'add' cannot .* no docstring"):
        start("brought_games:Tools")
    with pytest.raises(ValueError, match=r"'Deaf' has no method 'step', .* and no public method that is a tool"):
        start("brought_games:Deaf")
    with pytest.raises(ValueError, match=r"'Gane'; did you mean 'Game'\?"):
        start("brought_games:Gane")
    with pytest.raises(ValueError, match=r"'Broken' cannot be made: raised KeyError: 'start'"):
        start("brought_games:Broken")
    with pytest.raises(ValueError, match=r"'number' is 3 \(int\), which makes nothing"):
        start("brought_games:number")
    with pytest.raises(ValueError, match="names no class; write 'module:Class'"):
        Environments("brought_games")
    with pytest.raises(TypeError, match="makes no environments; give a class"):
        Environments(object())  # type: ignore[arg-type]
    for settings, told in (({"timeout_s": 0.0}, "timeout_s=0.0"), ({"workers": 0}, "workers=0")):
        with pytest.raises(ValueError, match=told):
            Environments(Counting, **settings)  # type: ignore[arg-type]


def test_methods_and_functions_are_tools_where_there_is_no_step() -> None:
    with Environments(Guessing, tools={"add": add}) as environments:
        assert environments.tool_names == ["add", "guess"]
        assert environments.sources == {"environment_factory": "Guessing", "tools": ["add"]}
        assert environments.can_rate
        call = {"type": "function", "function": {"name": "guess", "arguments": {"letter": "t"}}}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        asked = prompts([{"role": "user", "content": "Go."}], secret="tea")
        for _ in range(2):
            with environments.begin(asked) as episodes:
                assert episodes.observations == [" It has 3 letters."]
                assert episodes.step([0], [message]) == [[{"role": "tool", "name": "guess", "content": "t__"}]]
                assert episodes.tool_calls == [(1, 0)]
                assert [type(each) for each in episodes.environments] == [Guessing]
                assert episodes.ask("lengths", lambda own: [len(own[0].guesses)]) == [1]
                with pytest.raises(EnvironmentFailedError, match=r"'Guessing': lengths raised KeyError: 'x' .* for row 7"):
                    episodes.ask("lengths", lambda own: {}["x"])
                assert episodes.rewards() == [0.0]
    with Environments(NoEnvironment, tools={"add": add}) as environments:
        assert environments.sources == {"environment_factory": None, "tools": ["add"]}
        assert not environments.can_rate
    with pytest.raises(ValueError, match="tools add are given beside environment 'Counting', whose step answers the policy"):
        Environments(Counting, tools={"add": add}).start()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (5, r"reset returned 5 \(int\) for row 7; it must return text to put behind the prompt, or None"),
        ([{"type": "image"}], "reset, row 7: content of the type 'image' was returned"),
    ],
)
def test_what_cannot_stand_behind_a_prompt_is_told(answer: Any, told: str) -> None:
    class Odd(Guessing):
        def reset(self, secret: str) -> Any:  # type: ignore[override]
            return answer

    with Environments(Odd) as environments, pytest.raises(EnvironmentFailedError, match=told):
        environments.begin(prompts([{"role": "user", "content": "Go."}], secret="tea"))
