from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest
import torch

from grpo_fast.train.rng import derive_seed, load_rng_state, rng_state


def draws() -> tuple[list[float], list[float], list[float]]:
    first = [random.random(), random.gauss(0, 1), random.gauss(0, 1)]
    second = [float(np.random.rand()), float(np.random.randn())]  # noqa: NPY002
    return first, second, torch.rand(3).tolist()


@pytest.fixture(autouse=True)
def _leave_no_trace() -> object:
    before = rng_state()
    yield
    load_rng_state(before)


@pytest.mark.parametrize("warm", [0, 1, 3], ids=["fresh", "half a Gaussian held back", "later"])
def test_generators_go_on_where_they_were(warm: int) -> None:
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    for _ in range(warm):
        random.gauss(0, 1)
        np.random.randn()  # noqa: NPY002
        torch.randn(1)
    state = json.loads(json.dumps(rng_state()))
    expected = draws()
    assert draws() != expected
    load_rng_state(state)
    assert draws() == expected


def test_reading_the_state_draws_nothing() -> None:
    state = rng_state()
    assert rng_state() == state


def test_states_of_other_gpus_are_left_alone() -> None:
    state = rng_state()
    state["cuda"] = ["AAAA"] * (torch.cuda.device_count() + 1)
    expected = draws()
    load_rng_state(state)
    assert draws() == expected


def test_seeds_are_mixed_and_fit_an_int64() -> None:
    parts = list(itertools.product(range(6), repeat=3))
    seeds = {derive_seed(*values) for values in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3)
    assert derive_seed(1, 2) == derive_seed(1, 2, 0)
