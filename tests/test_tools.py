from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.async_code import AsyncCode
from grpo_fast.tools import NoEnvironment, NotTextError, Tool, ToolEnvironment, as_text, find_tools, methods_of, schemas_of

Play = Callable[..., ToolEnvironment]


def add(a: int, b: int = 1) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.

    Returns:
        Their sum.
    """
    return a + b


async def look_up(word: str) -> str:
    """Looks a word up.

    Args:
        word: What to look up. (choices: ["tea", "thé"])
    """
    await asyncio.sleep(0)
    return f"{word} is a drink"


class Guessing:
    """As TRL has environments: methods are tools."""

    closed = False

    def reset(self, secret: str, **columns: Any) -> str:
        self.secret, self.guesses = secret, list[str]()
        return f" It has {len(secret)} letters."

    def guess(self, letter: str) -> str:
        """Guesses a letter.

        Args:
            letter: One letter.
        """
        self.guesses.append(letter)
        if letter not in self.secret:
            raise ValueError("no such letter")
        return "".join(each if each in self.guesses else "_" for each in self.secret)

    def _hidden(self) -> None: ...

    @property
    def costly(self) -> int:
        raise AssertionError("properties are left alone")

    def get_reward(self) -> float:
        return float(set(self.secret) <= set(self.guesses))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def play() -> Iterator[Play]:
    loop = AsyncCode()

    def make(own: Any = None, functions: Mapping[str, Tool] | None = None) -> ToolEnvironment:
        return ToolEnvironment(own or NoEnvironment(), functions or {}, loop.awaited)

    yield make
    loop.close()


def said(*calls: tuple[str, Any]) -> dict[str, Any]:
    functions = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return {"role": "assistant", "content": "", "tool_calls": functions}


def contents(replies: list[dict[str, Any]] | None) -> list[tuple[str, str]]:
    assert replies is not None
    assert {reply["role"] for reply in replies} == {"tool"}
    return [(reply["name"], reply["content"]) for reply in replies]


def test_calls_are_answered_in_their_order_and_mistakes_are_told(play: Play) -> None:
    environment = play(functions=find_tools([add, look_up]))
    environment.reset()
    calls = said(("look_up", {"word": "thé"}), ("add", {"a": 2, "b": 3}), ("add", {"a": 1, "c": 2}), ("sub", {}), ("add", 4))
    answers = contents(environment.step(calls))
    assert answers[:2] == [("look_up", "thé is a drink"), ("add", "5")]
    assert "unexpected keyword argument 'c'" in answers[2][1]
    assert answers[2][1].startswith("{'error': ")
    assert answers[3] == ("sub", str({"error": "there is no tool 'sub'; there are: add, look_up"}))
    assert "must be a mapping" in answers[4][1]
    assert (environment.num_calls, environment.num_failures) == (5, 3)
    assert environment.step({"role": "assistant", "content": "It is 5."}) is None
    environment.reset()
    assert (environment.num_calls, environment.num_failures) == (0, 0)


def test_methods_of_an_environment_are_tools(play: Play) -> None:
    environment = play(Guessing(), find_tools([add]))
    assert list(environment.tools) == ["add", "guess"]
    assert environment.reset(secret="tea", answer=3) == " It has 3 letters."
    answers = contents(environment.step(said(("guess", {"letter": "e"}), ("guess", {"letter": "x"}))))
    assert answers == [("guess", "_e_"), ("guess", str({"error": "no such letter"}))]
    assert environment.get_reward() == 0.0  # type: ignore[attr-defined]
    environment.close()  # type: ignore[attr-defined]
    assert environment.own.closed
    assert environment.own.guesses == ["e", "x"]


def test_schemas_are_made_of_hints_and_docstrings() -> None:
    adding, looking = schemas_of(find_tools([add, look_up]))
    assert adding["function"]["description"] == "Adds two numbers."
    assert adding["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "The first."},
            "b": {"type": "integer", "description": "The second."},
        },
        "required": ["a"],
    }
    assert looking["function"]["parameters"]["properties"]["word"]["enum"] == ["tea", "thé"]
    [guessing] = schemas_of(methods_of(Guessing()))
    assert list(guessing["function"]["parameters"]["properties"]) == ["letter"]


def test_whatever_the_policy_has_a_tool_do_is_told_to_it(play: Play) -> None:
    """As code that it writes, which may end in ``exit()``, or in a number that Python writes in no decimals."""

    def run(code: str) -> Any:
        return eval(code, {"exit": sys.exit, "asyncio": asyncio})

    async def run_later(code: str) -> Any:
        await asyncio.sleep(0)
        return run(code)

    def run_inside(code: str) -> Any:
        return asyncio.run(run_later(code))

    for tool in (run, run_later, run_inside):
        environment = play(functions={"run": tool})
        environment.reset()
        codes = ("exit(2)", "10 ** 5000", "{}['a']", "6 * 7")
        texts = [text for _, text in contents(environment.step(said(*(("run", {"code": code}) for code in codes))))]
        assert texts[0] == "{'error': '2'}"
        assert "Exceeds the limit" in texts[1]
        assert texts[2:] == [str({"error": "'a'"}), "42"]
        assert (environment.num_calls, environment.num_failures) == (4, 3)


def test_what_a_tool_does_to_its_arguments_is_not_done_to_what_was_said(play: Play) -> None:
    def sort(items: list[int]) -> list[int]:
        items.sort()
        return items

    message = said(("sort", {"items": [2, 1]}))
    assert contents(play(functions={"sort": sort}).step(message)) == [("sort", "[1, 2]")]
    assert message == said(("sort", {"items": [2, 1]}))


def test_tools_are_known_by_the_names_that_they_are_called_by() -> None:
    def counted(tool: Tool) -> Tool:
        def wrapper(self, a: int) -> int:  # type: ignore[no-untyped-def]
            """Counts.

            Args:
                a: One number.
            """
            return int(tool(self, a))

        return wrapper

    class Counts:
        @counted
        def count(self, a: int) -> int:
            return a

        again = count

    assert [schema["function"]["name"] for schema in schemas_of(methods_of(Counts()))] == ["again", "count"]


def test_tools_that_cannot_be_used_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, play: Play) -> None:
    def bare(word): ...  # type: ignore[no-untyped-def]

    def untold(word: str) -> None:
        """Does something."""

    with pytest.raises(ValueError, match=r"tool 'bare' cannot be described to the model: .*no docstring"):
        schemas_of({"bare": bare})
    with pytest.raises(ValueError, match=r"tool 'untold' .*no description for the argument 'word'; each argument needs"):
        schemas_of({"untold": untold})

    async def later(word: str) -> AsyncIterator[str]:
        yield word

    def piecemeal(word: str) -> Iterator[str]:
        yield word

    for yields in (later, piecemeal):
        with pytest.raises(ValueError, match=f"tool '{yields.__name__}' yields, and the model reads what a tool returns"):
            schemas_of({yields.__name__: yields})
    around = r"write a function around it \(def\), of which each argument needs a type hint"
    with pytest.raises(ValueError, match=rf"tool 'add' cannot be described to the model: .*partial.* is not .*; {around}"):
        schemas_of(find_tools([functools.partial(add, b=2)]))

    class Adding:
        def __call__(self, a: int) -> int:
            """Adds.

            Args:
                a: One number.
            """
            return a

    with pytest.raises(ValueError, match=rf"tool 'Adding' cannot be described to the model: .*; {around}"):
        schemas_of(find_tools([Adding()]))
    (tmp_path / "brought_tools.py").write_text("def add(a): ...\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert list(find_tools(["brought_tools:add"])) == ["add"]
    with pytest.raises(ValueError, match="two tools have the name 'add'"):
        find_tools([add, "brought_tools:add"])
    with pytest.raises(ValueError, match=r"two tools have the name 'guess': a function and a method"):
        play(Guessing(), {"guess": add})
    with pytest.raises(TypeError, match="tool brought_tools:number is no function"):
        find_tools(["brought_tools:number"])
    with pytest.raises(ValueError, match=r"tool 'brought_tools:ad': .* did you mean 'add'\?"):
        find_tools(["brought_tools:ad"])
    with pytest.raises(ValueError, match="tool 'brought_tools' names no function; write 'module:function'"):
        find_tools(["brought_tools"])


def test_parameters_that_no_call_can_name_are_refused() -> None:
    def total(*numbers: int) -> int:
        """Adds.

        Args:
            numbers: All of them.
        """
        return sum(numbers)

    def tagged(text: str, **tags: str) -> str:
        """Tags a text.

        Args:
            text: What to tag.
            tags: With what.
        """
        return f"{text} {tags}"

    def half(number: int, /) -> float:
        """Halves.

        Args:
            number: What to halve.
        """
        return number / 2

    def logged(*arguments: int) -> int:
        return add(*arguments)

    fix = r"which no call can name, and arguments are given by name; "
    with pytest.raises(ValueError, match=rf"tool 'total' has the parameter '\*numbers', {fix}write its .* or take a list"):
        schemas_of({"total": total})
    with pytest.raises(ValueError, match=rf"tool 'tagged' has the parameter '\*\*tags', {fix}write its"):
        schemas_of({"tagged": tagged})
    with pytest.raises(ValueError, match=rf"tool 'half' has the parameter 'number', {fix}remove the '/' behind it"):
        schemas_of({"half": half})
    with pytest.raises(ValueError, match=r"'\*arguments', .*a decorator keeps those of its function by functools.wraps"):
        schemas_of({"logged": logged})
    assert schemas_of({"add": functools.wraps(add)(logged)}) == schemas_of({"add": add})


def test_results_are_read_as_text() -> None:
    assert as_text({"sum": 3}) == "{'sum': 3}"
    assert as_text(["a", "b"]) == "['a', 'b']"
    assert as_text([]) == "[]"
    assert as_text([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]) == "one two"
    data = [{"type": "article", "title": "Tea"}, {"type": ["odd"]}]
    assert as_text(data) == str(data)
    assert as_text([{"type": "text"}]) == "[{'type': 'text'}]"
    with pytest.raises(NotTextError, match="content of the type 'image' was returned, and models are trained on text alone"):
        as_text([{"type": "image", "image": None}])
