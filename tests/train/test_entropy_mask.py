from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from grpo_fast.train.entropy_mask import entropy_threshold


def drawn(size: int) -> np.ndarray:
    return np.random.default_rng(size).exponential(size=size)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("size", [1, 2, 11, 1000])
def test_it_is_the_quantile_of_all_parts_together(size: int, share: float) -> None:
    values = drawn(size)
    found = entropy_threshold([values[: size // 3], values[size // 3 :], values[:0]], share)
    assert found == pytest.approx(torch.quantile(torch.from_numpy(values), 1 - share).item(), rel=1e-5)


@pytest.mark.parametrize("share", [k / 10 for k in range(11)])
def test_a_quantile_that_is_a_token_keeps_it(share: float) -> None:
    values = drawn(11)
    threshold = entropy_threshold([values], share)
    assert (values.astype(np.float64) >= threshold).sum() == round(share * 10) + 1


def test_equal_entropies_are_all_kept() -> None:
    values = np.full(7, 0.1)
    assert (values >= entropy_threshold([values], 0.3)).all()


@pytest.mark.parametrize("parts", [[], [np.empty(0)]])
def test_without_tokens_it_is_infinite(parts: list[np.ndarray]) -> None:
    assert entropy_threshold(parts, 0.2) == math.inf
