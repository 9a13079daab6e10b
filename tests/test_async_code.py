from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path

import pytest

from grpo_fast import async_code
from grpo_fast.async_code import AsyncCode


@pytest.fixture
def loop() -> Iterator[AsyncCode]:
    code = AsyncCode()
    yield code
    code.close()
    code.close()


@pytest.mark.parametrize("inside", [False, True])
def test_a_loop_is_kept_from_call_to_call(loop: AsyncCode, inside: bool) -> None:
    async def running() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    async def in_a_notebook() -> set[asyncio.AbstractEventLoop]:
        return {loop.awaited(running()) for _ in range(3)}

    found = asyncio.run(in_a_notebook()) if inside else {loop.awaited(running()) for _ in range(3)}
    assert len(found | {loop.awaited(running())}) == 1
    assert loop.awaited(3) == 3


@pytest.mark.parametrize("inside", [False, True])
def test_several_are_awaited_at_once(loop: AsyncCode, inside: bool) -> None:
    done: list[str] = []

    def meeting() -> list[Awaitable[None]]:
        first, second = asyncio.Event(), asyncio.Event()

        async def waits(name: str, own: asyncio.Event, other: asyncio.Event) -> None:
            own.set()
            await other.wait()
            done.append(name)

        return [waits("a", first, second), waits("b", second, first)]

    async def in_a_notebook() -> None:
        loop.together(meeting())

    if inside:
        asyncio.run(in_a_notebook())
    else:
        loop.together(meeting())
    assert sorted(done) == ["a", "b"]
    loop.together([])


def test_where_one_fails_the_others_are_cancelled(loop: AsyncCode) -> None:
    ended: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    async def fails() -> None:
        await asyncio.sleep(0)
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        loop.together([waits(), fails()])
    assert ended == ["cancelled"]


def test_many_threads_may_wait_at_a_time(loop: AsyncCode) -> None:
    meeting = asyncio.Barrier(3)

    async def meet() -> asyncio.AbstractEventLoop:
        await meeting.wait()
        return asyncio.get_running_loop()

    found: list[asyncio.AbstractEventLoop] = []
    threads = [threading.Thread(target=lambda: found.append(loop.awaited(meet()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 3
    assert len(set(found)) == 1


@pytest.mark.parametrize("inside_a_task", [False, True])
def test_an_exit_is_told_and_does_not_end_the_loop(loop: AsyncCode, inside_a_task: bool) -> None:
    async def leave() -> None:
        sys.exit(3)

    async def leave_inside() -> None:
        await asyncio.create_task(leave())

    for _ in range(2):
        with pytest.raises(SystemExit, match="3"):
            loop.awaited(leave_inside() if inside_a_task else leave())
    assert loop.awaited(asyncio.sleep(0, "still there")) == "still there"


def test_what_blocks_the_loop_is_found(loop: AsyncCode) -> None:
    assert loop.blocked_at() == ""
    assert loop.awaited(asyncio.sleep(0, 1)) == 1
    assert loop.blocked_at() == ""
    began, released = threading.Event(), threading.Event()

    async def blocks() -> None:
        began.set()
        released.wait(60)  # this line

    waiting = threading.Thread(target=lambda: loop.awaited(blocks()))
    waiting.start()
    assert began.wait(20)
    told = loop.blocked_at()
    released.set()
    waiting.join(20)
    assert "test_async_code.py" in told
    assert told.endswith("in blocks: released.wait(60)  # this line")
    assert loop.blocked_at() == ""


def test_code_that_holds_others_up_is_told_once(
    loop: AsyncCode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(async_code, "_ANSWER_S", 0.05)

    async def careless() -> None:
        until = time.monotonic() + 20
        while not caplog.messages and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.2)

    for _ in range(2):
        loop.together([careless(), asyncio.sleep(0.01)])
    [told] = caplog.messages
    assert "async code blocks its event loop at" in told
    assert "test_async_code.py" in told
    assert "in careless: time.sleep(0." in told


@pytest.mark.parametrize("number", [1, 3])
def test_code_that_holds_nothing_up_is_not_told(
    number: int, loop: AsyncCode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(async_code, "_ANSWER_S", 0.5)

    async def alone() -> None:
        if number == 1:
            time.sleep(2)
        await asyncio.sleep(2)

    loop.together([alone() for _ in range(number)])
    assert not caplog.messages


def test_threads_beside_the_loop_give_what_they_ran(loop: AsyncCode) -> None:
    def broken() -> None:
        raise KeyError("inside")

    async def beside() -> list[int]:
        return await asyncio.gather(*(asyncio.to_thread(pow, n, 2) for n in range(50)))

    assert loop.awaited(beside()) == [n * n for n in range(50)]
    with pytest.raises(KeyError, match="inside"):
        loop.awaited(asyncio.to_thread(broken))


@pytest.mark.parametrize("hangs", ["await asyncio.to_thread(time.sleep, 600)", "time.sleep(600)"])
def test_what_hangs_does_not_keep_the_process(hangs: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import asyncio, threading, time\nfrom grpo_fast.async_code import AsyncCode\n"
        f"async def hang():\n    began.set()\n    {hangs}\n"
        "began, code = threading.Event(), AsyncCode()\n"
        "threading.Thread(target=lambda: code.awaited(hang()), daemon=True).start()\n"
        "began.wait()\ncode.close()\nprint('closed')\n"
    )
    begin = time.monotonic()
    ended = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (0, "closed\n"), ended.stderr
    assert time.monotonic() - begin < 100
