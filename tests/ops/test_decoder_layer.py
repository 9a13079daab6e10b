from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from grpo_fast.ops import decoder_layer as ops
from grpo_fast.ops.decoder_layer import LayerCache, LayerWeights, decoder_layer, few_rows_product

pytestmark = pytest.mark.skipif(bool(ops.problem()), reason=ops.problem())


@dataclass(frozen=True)
class Sizes:
    hidden: int = 40
    heads: int = 6
    kv_heads: int = 2
    head: int = 12
    inner: int = 50
    prompts: int = 3
    width: int = 7
    capacity: int = 9
    position: int = 4
    rows: int = 5
    norms: int = 2
    biased: bool = False
    ranks: tuple[int, ...] = ()


def case(sizes: Sizes, seed: int = 0) -> tuple[torch.Tensor, LayerWeights, LayerCache, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    of_queries, of_keys = sizes.heads * sizes.head, sizes.kv_heads * sizes.head
    shapes = [
        *((of_queries, sizes.hidden), (of_keys, sizes.hidden), (of_keys, sizes.hidden), (sizes.hidden, of_queries)),
        *((sizes.inner, sizes.hidden), (sizes.inner, sizes.hidden), (sizes.hidden, sizes.inner)),
    ]
    layer = LayerWeights(
        [1 + normal(size, scale=0.1) for size in [sizes.hidden, sizes.hidden, sizes.head, sizes.head][: sizes.norms]],
        [1e-5, 1e-6, 1e-5, 1e-6][: sizes.norms],
        [normal(*shape, scale=shape[1] ** -0.5) for shape in shapes],
        [normal(shape[0] if sizes.biased else 0) for shape in shapes],
        sizes.head**-0.5,
        [normal(rank, size if rank else 0, scale=size**-0.5) for rank, (_, size) in zip(sizes.ranks, shapes, strict=False)],
        [normal(size if rank else 0, rank, scale=0.3) for rank, (size, _) in zip(sizes.ranks, shapes, strict=False)],
    )
    prefix = (sizes.prompts, sizes.kv_heads, sizes.width, sizes.head)
    own = (sizes.rows + 2, sizes.kv_heads, sizes.capacity, sizes.head)
    cache = LayerCache(
        torch.arange(sizes.rows) % sizes.prompts,
        torch.arange(sizes.prompts) * 3 % (sizes.width + 1),
        *(normal(*prefix), normal(*prefix), normal(*own), normal(*own)),
        sizes.position,
    )
    angles = normal(sizes.rows, sizes.head // 2).repeat(1, 2)
    sin = angles.sin()
    sin[:, : sizes.head // 2] *= -1
    return normal(sizes.rows, sizes.hidden), layer, cache, angles.cos(), sin


def reference(
    hidden: torch.Tensor, layer: LayerWeights, cache: LayerCache, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, keys [n, key-value heads, D] and values of the new position, in float64."""
    hidden, cos, sin = hidden.double(), cos.double(), sin.double()

    def norm(values: torch.Tensor, index: int) -> torch.Tensor:
        if index >= len(layer.norms):
            return values
        scale = (values.square().mean(-1, keepdim=True) + layer.epsilons[index]).rsqrt()
        return values * scale * layer.norms[index].double()

    def linear(values: torch.Tensor, index: int) -> torch.Tensor:
        product = values @ layer.weights[index].double().T
        if layer.lora_a and layer.lora_a[index].numel():
            product = product + values @ layer.lora_a[index].double().T @ layer.lora_b[index].double().T
        return product + layer.biases[index].double() if len(layer.biases[index]) else product

    def rotate(values: torch.Tensor) -> torch.Tensor:
        return values * cos[:, None] + values.roll(values.shape[-1] // 2, -1) * sin[:, None]

    count, size = cos.shape
    normed = norm(hidden, 0)
    query, key, value = (linear(normed, index).view(count, -1, size) for index in range(3))
    query, key = rotate(norm(query, 2)), rotate(norm(key, 3))
    group = query.shape[1] // key.shape[1]
    mixed = torch.empty_like(query)
    for row, head in itertools.product(range(count), range(query.shape[1])):
        prompt, at = cache.source[row], head // group
        seen = slice(int(cache.padding[prompt]), None)
        keys = torch.cat((cache.prefix_keys[prompt, at, seen], cache.keys[row, at, : cache.position])).double()
        values = torch.cat((cache.prefix_values[prompt, at, seen], cache.values[row, at, : cache.position])).double()
        keys, values = torch.cat((keys, key[row, at, None])), torch.cat((values, value[row, at, None]))
        mixed[row, head] = (keys @ query[row, head] * layer.scale).softmax(0) @ values
    hidden = hidden + linear(mixed.flatten(1), 3)
    normed = norm(hidden, 1)
    gated = torch.nn.functional.silu(linear(normed, 4)) * linear(normed, 5)
    return hidden + linear(gated, 6), key, value


CASES = {
    "llama": Sizes(),
    "biases": Sizes(biased=True),
    "norms of heads": Sizes(norms=4),
    "whole vectors": Sizes(hidden=64, head=64, inner=96),
    "wide heads": Sizes(head=80, heads=3, kv_heads=1),
    "tiny heads": Sizes(head=2, hidden=3, inner=1),
    "a head of keys for each": Sizes(heads=2),
    "many queries a head": Sizes(heads=11, kv_heads=1),
    "one row": Sizes(rows=1),
    "many rows": Sizes(rows=19, position=8),
    "no prompt, first token": Sizes(width=0, position=0),
    "adapters": Sizes(ranks=(4, 8, 1, 16, 3, 9, 17)),
    "some adapters": Sizes(biased=True, ranks=(0, 0, 5, 0, 2, 0, 3), rows=7),
    "long": Sizes(width=70, capacity=60, position=50, heads=4),
}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_equals_the_reference(name: str) -> None:
    sizes = CASES[name]
    hidden, layer, cache, cos, sin = case(sizes)
    expected, key, value = reference(hidden, layer, cache, cos, sin)
    before = cache.keys.clone(), cache.values.clone()
    decoder_layer(hidden, layer, cache, cos, sin)
    torch.testing.assert_close(hidden.double(), expected, rtol=1e-5, atol=1e-5)
    for buffer, old, new in ((cache.keys, before[0], key), (cache.values, before[1], value)):
        written = buffer[: sizes.rows, :, sizes.position]
        torch.testing.assert_close(written.double(), new, rtol=1e-5, atol=1e-5)
        old[: sizes.rows, :, sizes.position] = written
        assert torch.equal(buffer, old), "nothing else is written"


@pytest.mark.parametrize("num_rows", range(1, 20))
@pytest.mark.parametrize(("size", "num_outputs"), [(1, 1), (15, 2), (16, 3), (33, 7), (32, 13), (100, 22), (576, 64)])
def test_products_equal_float64(num_rows: int, size: int, num_outputs: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    rows, weight = torch.randn(num_rows, size, generator=generator), torch.randn(num_outputs, size, generator=generator)
    bias = torch.randn(num_outputs, generator=generator)
    for each in (None, bias):
        expected = torch.nn.functional.linear(rows.double(), weight.double(), None if each is None else each.double())
        torch.testing.assert_close(few_rows_product(rows, weight, each).double(), expected, rtol=1e-5, atol=2e-5)


def test_a_row_depends_neither_on_the_rows_beside_it_nor_on_the_number_of_threads() -> None:
    sizes = Sizes(rows=13, hidden=320, inner=640, heads=8, ranks=(16,) * 7)
    hidden, layer, cache, cos, sin = case(sizes)
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count, num_threads in ((13, 1), (13, 3), (6, 2), (1, 1)):
            torch.set_num_threads(num_threads)
            some = hidden[:count].clone()
            own = cache._replace(source=cache.source[:count], keys=cache.keys.clone(), values=cache.values.clone())
            decoder_layer(some, layer, own, cos[:count], sin[:count])
            outputs.append(some)
    finally:
        torch.set_num_threads(threads)
    for some in outputs[1:]:
        assert torch.equal(some, outputs[0][: len(some)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_seen_and_in_its_row(value: float) -> None:
    hidden, layer, cache, cos, sin = case(Sizes())
    clean = hidden.clone()
    decoder_layer(clean, layer, cache, cos, sin)
    hidden[2, 3] = value
    decoder_layer(hidden, layer, cache, cos, sin)
    assert hidden[2].isnan().any()
    assert torch.equal(hidden[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_large_scores_and_gates_do_not_overflow() -> None:
    hidden, layer, cache, cos, sin = case(Sizes())
    layer.weights[0].mul_(300)
    layer.weights[4].mul_(300)
    expected, *_ = reference(hidden, layer, cache, cos, sin)
    decoder_layer(hidden, layer, cache, cos, sin)
    torch.testing.assert_close(hidden.double(), expected, rtol=2e-4, atol=2e-4)


def test_no_rows_are_no_work() -> None:
    hidden, layer, cache, cos, sin = case(Sizes())
    before = cache.keys.clone()
    decoder_layer(hidden[:0], layer, cache._replace(source=cache.source[:0]), cos[:0], sin[:0])
    assert torch.equal(cache.keys, before)
    assert few_rows_product(hidden[:0], torch.randn(3, 40)).shape == (0, 3)
    assert few_rows_product(hidden, torch.randn(0, 40)).shape == (5, 0)
    assert few_rows_product(hidden[:, :0], torch.randn(3, 0), torch.ones(3)).tolist() == [[1, 1, 1]] * 5


WRONG: dict[str, tuple[str, Callable[[LayerWeights, LayerCache], tuple[LayerWeights, LayerCache]]]] = {
    "a weight's shape": (
        "gate must be (50, 40)",
        lambda layer, cache: (layer._replace(weights=[*layer.weights[:4], torch.zeros(50, 39), *layer.weights[5:]]), cache),
    ),
    "a weight's type": (
        "down must be float32",
        lambda layer, cache: (layer._replace(weights=[*layer.weights[:6], layer.weights[6].double()]), cache),
    ),
    "too few weights": (
        "6 weights and 7 biases",
        lambda layer, cache: (layer._replace(weights=layer.weights[:6]), cache),
    ),
    "an adapter's shape": (
        "lora_b must be (72, 5)",
        lambda layer, cache: (
            layer._replace(lora_a=[torch.zeros(5, 40)] * 7, lora_b=[torch.zeros(72, 4)] * 7),
            cache,
        ),
    ),
    "an adapter that is no matrix": (
        "lora_a must be a matrix",
        lambda layer, cache: (layer._replace(lora_a=[torch.zeros(())] * 7, lora_b=[torch.zeros(())] * 7), cache),
    ),
    "half of an adapter": (
        "7 lora_a and 6 lora_b",
        lambda layer, cache: (layer._replace(lora_a=[torch.zeros(0)] * 7, lora_b=[torch.zeros(0)] * 6), cache),
    ),
    "a norm's size": (
        "a norm must be (40)",
        lambda layer, cache: (layer._replace(norms=[layer.norms[0], torch.ones(41)]), cache),
    ),
    "three norms": (
        "norms and epsilons must be 2 or 4",
        lambda layer, cache: (layer._replace(norms=[*layer.norms, torch.ones(12)]), cache),
    ),
    "an unknown prompt": ("source must lie in [0, 3)", lambda layer, cache: (layer, cache._replace(source=cache.source + 2))),
    "too much padding": (
        "padding must lie in [0, 8)",
        lambda layer, cache: (layer, cache._replace(padding=cache.padding + 7)),
    ),
    "no room": ("no room at 9 of 9", lambda layer, cache: (layer, cache._replace(position=9))),
    "prompts of other heads": (
        "prefix_values must be (3, 2, 7, 12)",
        lambda layer, cache: (layer, cache._replace(prefix_values=cache.prefix_values[:, :1].contiguous())),
    ),
    "a strided cache": (
        "keys must be float32 and contiguous",
        lambda layer, cache: (layer, cache._replace(keys=cache.keys.transpose(0, 1).contiguous().transpose(0, 1))),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name: str) -> None:
    message, change = WRONG[name]
    hidden, layer, cache, cos, sin = case(Sizes())
    before = hidden.clone()
    layer, cache = change(layer, cache)
    with pytest.raises(RuntimeError) as raised:
        decoder_layer(hidden, layer, cache, cos, sin)
    assert message in str(raised.value)
    assert torch.equal(hidden, before)


def test_heads_that_do_not_fit_are_named() -> None:
    hidden, layer, cache, cos, sin = case(Sizes(heads=5, kv_heads=2))
    with pytest.raises(RuntimeError, match="5 heads of 12 over 2 of keys"):
        decoder_layer(hidden, layer, cache, cos, sin)
    with pytest.raises(RuntimeError, match="2 heads of keys with 11 numbers"):
        decoder_layer(hidden, layer, cache, cos[:, :11].contiguous(), sin)
    with pytest.raises(RuntimeError, match="2 heads of keys with 0 numbers"):
        decoder_layer(hidden, layer, cache, cos[:, :0], sin)
    with pytest.raises(RuntimeError, match="0 heads of keys with 12 numbers"):
        decoder_layer(hidden, layer, cache._replace(keys=cache.keys[:, :0]), cos, sin)
