"""Two ranks, of which rank 0 works for longer than the other waits in one exchange; then one's thread fails, or is left alone.

Each prints what came of it as JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from grpo_fast.rollout import RolloutError
from grpo_fast.train.distributed import RankLostError, World

TIMEOUT_S = 6.0


def slow() -> int:
    time.sleep(1.6 * TIMEOUT_S)
    return 7


def fail() -> NoReturn:
    raise RolloutError("the server is gone")


def stumble(error: BaseException) -> NoReturn:
    raise error


def failures_beside(world: World) -> tuple[list[list[str]], float]:
    """What a thread of each rank is told when one of them fails between exchanges, and how long all of it took."""
    enter, begin = world.beside(), time.monotonic()
    exchanges: list[Callable[[], Any]] = [
        lambda: world.gather(lambda: 0),
        lambda: world.once(lambda: 0),
        lambda: world.patiently(lambda: 0),
        lambda: None,  # a failure after the last exchange
    ]

    def fails(rank: int, error: BaseException, exchange: Callable[[], Any]) -> str:
        try:
            with enter():
                world.gather(lambda: 0)
                if world.rank == rank:
                    stumble(error)
                exchange()
        except BaseException as raised:
            return f"{type(raised).__name__}: {raised}"
        return "nothing"

    told = [[fails(rank, MemoryError("no room"), exchange) for exchange in exchanges] for rank in range(2)]
    told.append([fails(1, SystemExit(3), exchanges[0]), fails(-1, SystemExit(4), exchanges[0])])
    return told, time.monotonic() - begin


def main() -> None:
    world = World.join(torch.device("cpu"), timeout_s=TIMEOUT_S, join_timeout_s=60)

    def told(make: Callable[[], Any]) -> Any:
        try:
            return world.patiently(make)
        except RolloutError as error:
            return f"{type(error).__name__}: {error}"

    begin = time.monotonic()
    answers = [told(make) for make in (slow, fail, lambda: "quick")]
    found = {"timeout": TIMEOUT_S, "waited": time.monotonic() - begin, "answers": answers, "left alone": ""}
    found["failed beside"], found["heard within"] = failures_beside(world)
    enter = world.beside()
    if not world.is_main:
        try:
            with enter():
                world.gather(lambda: "nobody comes")
        except RankLostError as error:
            found["left alone"] = str(error)
    world.close()
    again = World.join(torch.device("cpu"), timeout_s=TIMEOUT_S, join_timeout_s=60)
    print(json.dumps(found | {"again": again.gather(lambda: again.rank)}))
    again.close()
