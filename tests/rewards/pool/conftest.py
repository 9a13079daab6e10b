from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from grpo_fast.rewards import RewardPool


@pytest.fixture
def make_pool() -> Iterator[Callable[..., RewardPool]]:
    pools: list[RewardPool] = []

    def make(*reward_funcs: Any, **options: Any) -> RewardPool:
        pools.append(RewardPool(reward_funcs, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()
