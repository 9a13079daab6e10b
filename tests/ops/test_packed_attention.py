from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from grpo_fast.ops.packed_attention import (
    PackedLayout,
    Piece,
    Scores,
    _fits_varlen,
    _varlen,
    packed_attention,
    packed_attention_reference,
    packed_layout,
)

CPU = torch.device("cpu")
SCORES = {
    "plain": Scores(0.3),
    "window": Scores(0.3, window=4),
    "softcap": Scores(0.3, softcap=0.5),
    "window and softcap": Scores(0.3, window=4, softcap=0.5),
    "a window wider than any sequence": Scores(0.3, window=1000),
}
SHARED = [Piece(0, 5), Piece(5, 3, 0, 5), Piece(8, 4, 0, 5), Piece(12, 6), Piece(18, 1, 12, 6), Piece(19, 7)]


def whole(*lengths: int) -> list[Piece]:
    return [Piece(sum(lengths[:number]), length) for number, length in enumerate(lengths)]


LAYOUTS = {
    "ragged": whole(3, 50, 7, 1, 40, 90),
    "of one length": whole(6, 6, 6),
    "one sequence": whole(9),
    "a shared prompt": SHARED,
    "a shared prompt and long completions": [Piece(0, 3), Piece(3, 70, 0, 3), Piece(73, 2, 0, 3)],
}


def inputs(layout: PackedLayout, *, dtype: torch.dtype = torch.float64, device: torch.device = CPU) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(len(layout.place), heads, 8) for heads in (4, 2, 2)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [side.to(device, dtype).requires_grad_() for side in made]


def with_gradients(out: torch.Tensor, sides: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(out)
    return [out, *torch.autograd.grad((out * weights).sum(), sides)]


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("pieces", LAYOUTS.values(), ids=LAYOUTS)
def test_output_and_gradients_are_those_of_a_masked_square(pieces: list[Piece], scores: Scores) -> None:
    layout = packed_layout(pieces, device=CPU)
    sides = inputs(layout)
    expected = with_gradients(packed_attention_reference(*sides, layout, scores), sides)
    found = with_gradients(packed_attention(*sides, layout, scores), sides)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scores", [SCORES["plain"], SCORES["window and softcap"]])
def test_no_sequence_sees_another(scores: Scores) -> None:
    layout = packed_layout(LAYOUTS["ragged"], device=CPU)
    sides = inputs(layout)
    before = packed_attention(*sides, layout, scores)
    changed = [side.detach().clone() for side in sides]
    for side in changed:
        side[3:53] = float("nan")  # the second sequence
    after = packed_attention(*changed, layout, scores)
    others = torch.cat((torch.arange(3), torch.arange(53, len(before))))
    assert torch.equal(after[others], before[others])
    assert after[3:53].isnan().all()
    # the guard: one sequence of all tokens does see
    joined = packed_layout(whole(len(before)), device=CPU)
    assert packed_attention(*changed, joined, SCORES["plain"])[53:].isnan().all()


def test_completions_of_a_prompt_do_not_see_each_other() -> None:
    layout = packed_layout(SHARED, device=CPU)
    sides = inputs(layout)
    before = packed_attention(*sides, layout, SCORES["plain"])
    changed = [side.detach().clone() for side in sides]
    for side in changed:
        side[5:8] = 9.0
    after = packed_attention(*changed, layout, SCORES["plain"])
    same = (before == after).all(dim=(1, 2))
    assert same.tolist() == [True] * 5 + [False] * 3 + [True] * 18


def test_the_backward_pass_writes_no_row_of_zeros_for_each_bucket() -> None:
    pieces = [piece for start in range(0, 60, 15) for piece in (Piece(start, 5), Piece(start + 5, 10, start, 5))]
    layout = packed_layout(pieces, device=CPU)
    sides = [torch.randn(60, 2, 8, requires_grad=True) for _ in range(3)]
    with torch.profiler.profile() as profile:
        packed_attention(*sides, layout, Scores(scale=0.5)).sum().backward()
    called = {event.key: event.count for event in profile.key_averages()}
    assert called["aten::scaled_dot_product_attention"] == len(layout.buckets) == 5
    assert "aten::slice_backward" not in called
    assert called["aten::split_with_sizes"] >= 5


def test_similar_lengths_share_a_call_and_short_ones_always() -> None:
    widths = [(bucket.num_rows, bucket.width) for bucket in packed_layout(whole(100, 76, 67, 50, 3, 3), device=CPU).buckets]
    assert widths == [(2, 100), (2, 67), (2, 3)]
    assert packed_layout(whole(30, 3, 7), device=CPU).buckets == ((3, 30, None),)


def test_sequences_of_one_length_are_not_moved() -> None:
    layout = packed_layout(whole(4, 4, 4), device=CPU)
    assert layout.in_order
    assert layout.padding is None
    assert not packed_layout(whole(4, 5), device=CPU).in_order


def test_borders_for_variable_length_kernels() -> None:
    layout = packed_layout(whole(4, 1, 2), device=CPU)
    assert layout.cu_seqlens.tolist() == [0, 4, 5, 7]
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.max_seqlen == 4
    assert not layout.shares_prompts
    assert packed_layout(SHARED, device=CPU).shares_prompts


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([Piece(0, 3), Piece(4, 2)], "piece 1 .* must begin at 3"),
        ([Piece(0, 0)], "at least one token"),
        ([], "there are no pieces"),
        ([Piece(0, 2), Piece(2, 2, 1, 3)], "piece 1 .* its prompt does not lie before it"),
        ([Piece(0, 5), Piece(5, 2, 0, 5), Piece(7, 2, 3, 2)], r"prompts at \(0, 5\) and at \(3, 5\) overlap"),
    ],
)
def test_pieces_that_make_no_row_are_refused(pieces: list[Piece], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed_layout(pieces, device=CPU)


def test_a_layout_of_other_tokens_is_refused() -> None:
    layout = packed_layout(whole(3, 2), device=CPU)
    sides = [side[:4] for side in inputs(layout)]
    with pytest.raises(ValueError, match="4 queries for a layout of 5 tokens"):
        packed_attention(*sides, layout, SCORES["plain"])


@pytest.mark.parametrize("scores", [SCORES["plain"], SCORES["window"]])
def test_half_precision_is_close(scores: Scores) -> None:
    layout = packed_layout(LAYOUTS["ragged"], device=CPU)
    sides = inputs(layout, dtype=torch.bfloat16)
    exact = [side.detach().double().requires_grad_() for side in sides]
    expected = with_gradients(packed_attention_reference(*exact, layout, scores), exact)
    found = with_gradients(packed_attention(*sides, layout, scores), sides)
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).abs().max() <= 2**-6 * other.abs().max()


def varlen_of_torch_2_11(*given: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> torch.Tensor:
    """Its signature; its kernel tells shared heads from the shapes."""
    return torch.ops.torch_attn._varlen_attn(*given, window_size == (-1, 0), scale, list(window_size))[0]


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_the_variable_length_kernel_takes_what_it_is_given(
    older: bool, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if older:
        monkeypatch.setattr(varlen, "varlen_attn", varlen_of_torch_2_11)
    layout = packed_layout(whole(4, 9), device=CPU)
    for scores in (SCORES["plain"], SCORES["window"]):
        with FakeTensorMode(allow_non_fake_inputs=True):  # there is no kernel on a CPU, but its signature, shapes and gradients
            query, key = (torch.randn(13, heads, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, key_heads))
            value = torch.randn_like(key, requires_grad=True)
            out = _varlen(query, key, value, layout, scores)
            gradients = torch.autograd.grad(out.sum(), [query, key, value])
        assert out.shape == query.shape
        assert [gradient.shape for gradient in gradients] == [query.shape, key.shape, key.shape]


def test_the_variable_length_kernel_is_not_asked_for_what_it_cannot_do() -> None:
    class OnGpu(NamedTuple):
        dtype: torch.dtype = torch.bfloat16
        shape: tuple[int, int, int] = (13, 4, 64)
        is_cuda: bool = True

    def fits(query: OnGpu, pieces: list[Piece], scores: Scores = SCORES["window"]) -> bool:
        return _fits_varlen(query, packed_layout(pieces, device=CPU), scores)  # type: ignore[arg-type]

    pieces = whole(4, 9)
    assert fits(OnGpu(), pieces)
    assert not fits(OnGpu(is_cuda=False), pieces)
    assert not fits(OnGpu(dtype=torch.float32), pieces)
    assert not fits(OnGpu(shape=(13, 4, 264)), pieces)
    assert not fits(OnGpu(shape=(13, 4, 20)), pieces)  # not a multiple of 8
    assert not fits(OnGpu(), pieces, SCORES["softcap"])
    assert not fits(OnGpu(), SHARED)


@pytest.mark.gpu
@pytest.mark.parametrize("scores", [SCORES["plain"], SCORES["window"], SCORES["softcap"]])
@pytest.mark.parametrize("pieces", LAYOUTS.values(), ids=LAYOUTS)
def test_on_a_gpu_the_variable_length_kernel_agrees(pieces: list[Piece], scores: Scores) -> None:
    device = torch.device("cuda")
    layout = packed_layout(pieces, device=device)
    sides = inputs(layout, dtype=torch.bfloat16, device=device)
    exact = [side.detach().double().requires_grad_() for side in sides]
    expected = with_gradients(packed_attention_reference(*exact, layout, scores), exact)
    found = with_gradients(packed_attention(*sides, layout, scores), sides)
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).abs().max() <= 2**-6 * other.abs().max()
