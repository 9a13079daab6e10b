"""Two ranks, of which rank 0 works for longer than the other waits in one exchange, and then leaves its thread alone.

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
