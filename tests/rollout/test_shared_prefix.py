from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from grpo_fast.rollout.shared_prefix import SharedPrefixCache

HEADS, QUERIES, SIZE, WIDTH, ROOM = 2, 3, 8, 5, 6


class Plain:
    """Every completion with its own copy of everything, in float64."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, source: np.ndarray, padding: np.ndarray) -> None:
        self.rows = [(keys[u][:, padding[u] :].double(), values[u][:, padding[u] :].double()) for u in source]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        out = []
        for row, past in enumerate(self.rows):
            new = key[row, :, None].double(), value[row, :, None].double()
            keys, values = self.rows[row] = torch.cat((past[0], new[0]), 1), torch.cat((past[1], new[1]), 1)
            scores = query[row].double().view(HEADS, QUERIES, SIZE) @ keys.transpose(1, 2) * scale
            out.append((scores.softmax(-1) @ values).reshape(-1))
        return torch.stack(out)


@pytest.mark.parametrize("padding", [[0, 0, 0], [4, 0, 2]])
def test_equals_attention_over_copies_while_groups_shrink(padding: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    prefilled = DynamicCache()
    prefilled.update(draw(3, HEADS, WIDTH, SIZE), draw(3, HEADS, WIDTH, SIZE), 0)
    layer = prefilled.layers[0]
    source = np.array([0, 0, 0, 0, 1, 1, 2])
    cache = SharedPrefixCache(source, np.array(padding), max_tokens=ROOM, like=prefilled)
    cache.fill(slice(0, 3), prefilled)
    plain = Plain(layer.keys, layer.values, source, np.array(padding))
    # After each step: which rows move where, and how many stay. Prompt 1 loses its last completion at the second move.
    moves: list[tuple[list[int], list[int], int]] = [([6], [1], 6), ([3], [4], 5), ([0], [2], 3), ([], [], 1), ([], [], 1)]
    for source_rows, target_rows, count in moves:
        rows = len(plain.rows)
        query, key, value = draw(rows, HEADS * QUERIES, SIZE), draw(rows, HEADS, SIZE), draw(rows, HEADS, SIZE)
        got = cache.attend(0, query, key, value, scale=0.3)
        torch.testing.assert_close(got.double(), plain.attend(query, key, value, 0.3), rtol=0, atol=2e-6)
        cache.move(torch.tensor(source_rows, dtype=torch.long), torch.tensor(target_rows, dtype=torch.long), count)
        for target, origin in zip(target_rows, source_rows, strict=True):
            plain.rows[target] = plain.rows[origin]
        del plain.rows[count:]


def test_prompts_without_completions_are_forgotten() -> None:
    prefilled = DynamicCache()
    prefilled.update(torch.randn(3, HEADS, WIDTH, SIZE), torch.randn(3, HEADS, WIDTH, SIZE), 0)
    cache = SharedPrefixCache(np.array([0, 1, 2]), np.array([0, 1, 2]), max_tokens=ROOM, like=prefilled)
    cache.fill(slice(0, 3), prefilled)
    cache.move(torch.tensor([2]), torch.tensor([0]), 1)
    assert [len(side) for side in cache._prefixes[0]] == [1, 1]
    assert torch.equal(cache._prefixes[0][0][0], prefilled.layers[0].keys[2])
    assert cache._padding.tolist() == [2]
