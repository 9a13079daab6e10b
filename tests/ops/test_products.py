from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear as torch_linear

from grpo_fast.ops import products
from grpo_fast.ops.products import (
    PackedWeight,
    ProductLinear,
    add_outer,
    as_operand,
    linear,
    linear_into,
    mm,
    mm_into,
    mm_of,
    onednn_is_faster,
    pays_to_pack,
    rounded_rows,
    use_products,
    with_gradient,
)

pytestmark = pytest.mark.skipif(not products.ONEDNN_OPS, reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def uses_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where it is faster; it runs on any."""
    monkeypatch.setattr(products, "USES_ONEDNN", True)
    monkeypatch.setattr(products, "_LEAST_WORK", 1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_as_exact_as_torch(found: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """Within four times the error of torch's own float32 product, and half an ulp."""
    error, allowed = (found - truth).abs().max(), 4 * (plain - truth).abs().max() + truth.abs().max() * 2**-24
    assert truth.abs().max() > 0
    assert error <= allowed


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (2, 5, 24)], ids=str)
def test_a_linear_product_and_its_gradients(shape: tuple[int, ...], bias: bool) -> None:
    inputs = [normal(*shape), normal(40, 24, seed=1), normal(40, seed=2) if bias else None]
    upstream = normal(*shape[:-1], 40, seed=3)
    results = []
    for run, dtype in ((linear, torch.float32), (torch_linear, torch.float32), (torch_linear, torch.float64)):
        leaves = [None if side is None else side.clone().to(dtype).detach().requires_grad_() for side in inputs]
        out = run(*leaves)
        out.backward(upstream.to(dtype))
        results.append([out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)])
    for found, plain, truth in zip(*results, strict=True):
        assert_as_exact_as_torch(found, plain, truth)


def test_views_and_expanded_gradients_are_taken_as_they_are() -> None:
    rows = normal(24, 2, 6).permute(2, 1, 0).requires_grad_()
    weight = normal(40, 48, seed=1)[:, ::2].requires_grad_()
    linear(rows, weight).sum().backward()
    truth = torch.ones(12, 40).double()
    torch.testing.assert_close(rows.grad.flatten(0, 1).double(), truth @ weight.detach().double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), truth.T @ rows.detach().flatten(0, 1).double(), rtol=1e-5, atol=1e-5)


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    rows, weight = normal(4, 24), normal(40, 24, seed=1)
    linear(rows.requires_grad_(), weight).sum().backward()
    assert rows.grad is not None
    linear(rows.detach(), weight.requires_grad_()).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("num_weights", [96, 2100])  # more than two slices
def test_the_products_of_a_head(num_weights: int) -> None:
    rows, weight, exp = normal(16, 32), normal(num_weights, 32, seed=1), normal(16, num_weights, seed=2)
    out = torch.full((16, num_weights), float("nan"))
    linear_into(rows, weight, out=out)
    assert_as_exact_as_torch(out, rows @ weight.T, rows.double() @ weight.double().T)
    assert_as_exact_as_torch(mm(exp, weight), exp @ weight, exp.double() @ weight.double())
    outer = exp.double().T @ rows.double()
    total = add_outer(None, exp, rows)
    assert_as_exact_as_torch(total, exp.T @ rows, outer)
    again = add_outer(total, exp, rows)
    assert again is total
    assert_as_exact_as_torch(again, (exp.T @ rows) * 2, outer * 2)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    rows, weight = normal(200, 96), normal(160, 96, seed=1)
    whole = linear(rows, weight)
    alone = [torch.equal(linear(rows[:count], weight), whole[:count]) for count in (2, 8, 24, 128)]
    assert all(alone) or not products.ROWS_STAND_ALONE


def test_what_is_small_or_not_float32_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = normal(8, 24), normal(40, 24, seed=1)
    assert linear(rows.double(), weight.double()).dtype == torch.float64
    assert linear(rows.to("meta"), weight.to("meta")).device.type == "meta"
    assert linear(rows[0], weight).shape == (40,)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(rows, weight).dtype == torch.bfloat16
    monkeypatch.setattr(products, "_onednn", None)  # calling it would raise
    monkeypatch.setattr(products, "_LEAST_WORK", 8 * 24 * 40 + 1)
    assert torch.equal(linear(rows, weight), torch_linear(rows, weight))


def test_layers_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.ReLU(), torch.nn.Linear(40, 8).double())
    names = {name: id(value) for name, value in model.named_parameters()}
    before = model[:2](normal(4, 24))
    use_products(model)
    assert [type(module) for module in model] == [ProductLinear, torch.nn.ReLU, torch.nn.Linear]
    assert {name: id(value) for name, value in model.named_parameters()} == names
    torch.testing.assert_close(model[:2](normal(4, 24)), before)
    monkeypatch.setattr(products, "USES_ONEDNN", False)
    other = torch.nn.Sequential(torch.nn.Linear(24, 40))
    use_products(other)
    assert type(other[0]) is torch.nn.Linear


def test_rows_are_rounded_to_few_numbers_and_little_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    found = [rounded_rows(number, cpu) for number in range(4097)]
    assert found[:17] == list(range(17))
    assert all(0 <= rounded - number <= number / 8 for number, rounded in enumerate(found))
    assert found == sorted(found)
    assert found == [rounded_rows(number, cpu) for number in found]
    assert len(set(found[2049:])) == 8
    assert rounded_rows(4095, torch.device("cuda")) == 4095
    monkeypatch.setattr(products, "USES_ONEDNN", False)
    assert rounded_rows(4095, cpu) == 4095


@pytest.mark.parametrize("bias", [False, True])
def test_packed_weights_are_their_layers_side_by_side(bias: bool) -> None:
    layers = [ProductLinear(24, 40, bias=bias), ProductLinear(24, 8, bias=bias)]
    packed = PackedWeight(layers)
    rows = normal(5, 24)
    for found, layer in zip(packed(rows).split(packed.sizes, dim=-1), layers, strict=True):
        torch.testing.assert_close(found, layer(rows).detach())
    with pytest.raises(ValueError, match="1 of 2 layers have a bias"):
        PackedWeight([ProductLinear(24, 8), ProductLinear(24, 8, bias=False)])


def test_packing_pays_for_many_uses_of_a_layer_that_goes_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ProductLinear(24, 40)
    assert pays_to_pack(layer, num_rows=8, num_uses=64)
    assert not pays_to_pack(layer, num_rows=8, num_uses=4)
    assert not pays_to_pack(torch.nn.Linear(24, 40), num_rows=8, num_uses=64)
    assert not pays_to_pack(layer.double(), num_rows=8, num_uses=64)
    monkeypatch.setattr(products, "_LEAST_WORK", 8 * 24 * 40 + 1)
    assert not pays_to_pack(ProductLinear(24, 40), num_rows=8, num_uses=64)


@pytest.mark.parametrize(
    ("vendor", "flags", "faster"),
    [("AuthenticAMD", "sse2 avx2 avx512f", True), ("AuthenticAMD", "sse2 avx2", False), ("GenuineIntel", "avx512f", False)],
)
def test_which_processors_are_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, flags: str, faster: bool
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags} sse\n", encoding="utf-8")
    monkeypatch.setattr(products, "ROWS_STAND_ALONE", True)
    assert onednn_is_faster(cpuinfo) == (faster and torch.backends.mkl.is_available())
    assert not onednn_is_faster(tmp_path / "nothing")
    monkeypatch.setattr(products, "ROWS_STAND_ALONE", False)  # torch 2.11, whose oneDNN is older
    assert not onednn_is_faster(cpuinfo)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_the_compilers_product_is_the_operator() -> None:
    rows, weight, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    torch.library.opcheck(products._product, (rows, weight, bias), test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(products._product(rows, weight.contiguous(), bias), products._onednn(rows, weight, bias))


@pytest.mark.parametrize("short", [None, torch.bfloat16])
def test_operands_are_rounded_and_multiplied_in_float32(short: torch.dtype | None, device: torch.device) -> None:
    left, right = torch.randn(5, 24, device=device), torch.randn(24, 7, device=device)
    operands = [as_operand(matrix, short, torch.float32) for matrix in (left, right)]
    exact = [(matrix if short is None else matrix.to(short)).double() for matrix in (left, right)]
    found = mm_of(operands[0], operands[1])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact[0] @ exact[1], rtol=1e-5, atol=1e-5)
    total = torch.ones_like(found)
    mm_into(operands[0], operands[1], out=total, add=True)
    torch.testing.assert_close(total.double(), exact[0] @ exact[1] + 1, rtol=1e-5, atol=1e-5)
    mm_into(operands[0], operands[1], out=total)
    torch.testing.assert_close(total.double(), exact[0] @ exact[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("short", [torch.float16, torch.bfloat16])
def test_small_gradients_are_multiplied_with_operands_of_16_bits(short: torch.dtype, device: torch.device) -> None:
    gradient, operand = 1e-9 * torch.randn(5, 24, device=device), torch.randn(24, 7, device=device).to(short)
    left, right = with_gradient(gradient, operand)
    assert left.dtype == right.dtype == (torch.float32 if short == torch.float16 else short)
    found, exact = mm_of(left, right), gradient.double() @ operand.double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-10 if short == torch.bfloat16 else 1e-14)
    assert exact.abs().max() > 1e-9
