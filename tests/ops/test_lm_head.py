from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from grpo_fast.ops.lm_head import (
    ROW_MULTIPLE,
    LMHead,
    check_rows,
    check_targets,
    default_chunk_bytes,
    row_chunks,
    rows_per_chunk,
    short_operands,
)

CPU = torch.device("cpu")


def test_rows_are_cut_evenly_in_multiples() -> None:
    assert [s.stop - s.start for s in row_chunks(3, 83, max_rows=32)] == [32, 24, 24]
    assert [(s.start, s.stop) for s in row_chunks(5, 18, max_rows=8)] == [(5, 13), (13, 18)]
    assert list(row_chunks(5, 5, max_rows=8)) == []
    for stop in range(1, 100):
        for max_rows in (8, 16, 40):
            cuts = list(row_chunks(0, stop, max_rows=max_rows))
            assert [cut.start for cut in cuts[1:]] == [cut.stop for cut in cuts[:-1]]
            assert (cuts[0].start, cuts[-1].stop) == (0, stop)
            assert all(0 < cut.stop - cut.start <= max_rows for cut in cuts)
            assert all(cut.start % ROW_MULTIPLE == 0 for cut in cuts)
            assert len(cuts) == -(-stop // max_rows)


def test_a_chunk_fits_its_bytes() -> None:
    head = LMHead(torch.zeros(37, 5))
    assert rows_per_chunk(replace(head, chunk_bytes=1), CPU, bytes_per_logit=4) == 8
    assert rows_per_chunk(replace(head, chunk_bytes=37 * 4 * 31), CPU, bytes_per_logit=4) == 24
    assert rows_per_chunk(head, CPU, bytes_per_logit=4) == default_chunk_bytes(CPU) // (37 * 4) // 8 * 8


def test_what_is_derived_from_the_numbers() -> None:
    head = LMHead(torch.zeros(3, 2), temperature=0.5, logit_scale=0.25)
    assert head.slope == 0.5
    assert head.bound is None
    assert head.numbers == (0.5, 1.0, False, False)
    capped = replace(head, softcap=3.0, logits_dtype=torch.bfloat16)
    assert capped.bound == 6.0
    assert capped.numbers == (0.25 / 3, 6.0, True, True)
    u = torch.linspace(-9, 9, 19, dtype=torch.float64)
    torch.testing.assert_close(replace(capped, logits_dtype=None).logits_of(u), 6 * torch.tanh(0.25 / 3 * u))
    assert head.finite_bias(torch.float32) is None
    bias = replace(head, bias=torch.tensor([1.0, -torch.inf, torch.nan])).finite_bias(torch.float64)
    assert bias is not None
    assert bias[0] == 1
    assert -1e303 < bias[1] < -1e300
    assert bias[2].isnan()
    assert not head.rounds_logits
    assert not replace(head, logits_dtype=torch.float32).rounds_logits
    assert replace(head, logits_dtype=torch.bfloat16).rounds_logits


def test_operands_are_rounded_and_let_gradients_through() -> None:
    values = torch.randn(4, 3, requires_grad=True)
    head = LMHead(torch.randn(7, 3), operand_dtype=torch.bfloat16)
    rounded = head.operand(values)
    assert torch.equal(rounded, values.detach().bfloat16().float())
    assert not torch.equal(rounded, values)
    rounded.square().sum().backward()
    assert torch.equal(values.grad, 2 * rounded.detach())
    assert replace(head, operand_dtype=None).operand(values) is values


@pytest.mark.parametrize(
    ("hidden", "weight", "operand", "expected"),
    [
        (torch.float32, torch.float32, None, None),
        (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, None, None),
        (torch.bfloat16, torch.bfloat16, None, torch.bfloat16),
        (torch.float16, torch.float16, None, torch.float16),
        (torch.float16, torch.bfloat16, None, None),
        (torch.float64, torch.float64, None, None),
    ],
)
def test_products_are_short_where_both_operands_are(
    hidden: torch.dtype, weight: torch.dtype, operand: torch.dtype | None, expected: torch.dtype | None
) -> None:
    head = LMHead(torch.zeros(7, 3, dtype=weight), operand_dtype=operand)
    assert short_operands(torch.zeros(2, 3, dtype=hidden), head) == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": 0.0}, "temperature=0"),
        ({"temperature": float("inf")}, "temperature=inf; it must be positive and finite"),
        ({"softcap": -1.0}, "softcap=-1"),
        ({"softcap": float("inf")}, "softcap=inf; it must be positive and finite, or None for no cap"),
        ({"chunk_bytes": 0}, "chunk_bytes=0"),
        ({"chunk_bytes": 1e6}, "chunk_bytes=1000000.0; it must be a whole number"),
        ({"bias": torch.zeros(36)}, "bias has shape"),
        ({"weight": torch.zeros(3)}, "weight has shape"),
        ({"logits_dtype": torch.float16}, "logits_dtype=torch.float16"),
        ({"operand_dtype": torch.float32}, "operand_dtype=torch.float32; choose bfloat16, float16 or None"),
    ],
)
def test_impossible_heads_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LMHead(torch.zeros(37, 5)), **wrong)


def test_a_layer_is_no_head_and_no_weight() -> None:
    layer, rows, targets = torch.nn.Linear(5, 37), torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)
    with pytest.raises(TypeError, match=r"weight is a Linear; give tensors: LMHead\(layer.weight, layer.bias\)"):
        LMHead(layer)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"head is a Linear; give LMHead\(weight, bias\), of a layer LMHead\(layer.weight, layer.bias\)"
    ):
        check_rows(rows, layer, targets)  # type: ignore[arg-type]


def test_rows_and_targets_that_do_not_fit_the_head_are_refused() -> None:
    head, rows, targets = LMHead(torch.zeros(37, 5), torch.zeros(37)), torch.zeros(2, 5), torch.tensor([0, 36])
    check_rows(rows, head, targets)
    check_targets(rows, head, targets)
    check_targets(rows[:0], head, targets[:0])
    with pytest.raises(TypeError, match=r"hidden is torch\.int64; give floats"):
        check_rows(rows.long(), head, targets)
    with pytest.raises(TypeError, match=r"the head's weight is torch\.int64; give floats"):
        check_rows(rows, LMHead(torch.zeros(37, 5).long()), targets)
    with pytest.raises(ValueError, match="the head's weight is on meta and the rows are on cpu; move it there"):
        check_rows(rows, LMHead(head.weight.to("meta")), targets)
    with pytest.raises(ValueError, match="the head's bias is on meta and the rows are on cpu"):
        check_rows(rows, replace(head, bias=torch.zeros(37, device="meta")), targets)
    with pytest.raises(ValueError, match="targets is on meta and the rows are on cpu"):
        check_targets(rows, head, targets.to("meta"))
    for wrong, told in (([0, 37], "from 0 to 37"), ([-100, 4], "from -100 to 4")):
        with pytest.raises(
            ValueError, match=rf"targets go {told}; they must be from 0 to 36. Leave out rows that are not scored"
        ):
            check_targets(rows, head, torch.tensor(wrong))
