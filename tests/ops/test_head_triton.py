"""The pass by cuBLAS and Triton: how rows are cut, what lives at once, and its agreement with the pass in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch

from grpo_fast.ops import head_triton
from grpo_fast.ops.head_pass import HeadPass, RowGradient, row_statistics
from grpo_fast.ops.head_shapes import Choice, Key
from grpo_fast.ops.head_torch import TorchHeadPass
from grpo_fast.ops.head_triton import TritonHeadPass, _chunk_shape, _products_in, aot_calls
from grpo_fast.ops.lm_head import LMHead, row_chunks
from tests.ops.conftest import Launch
from tests.ops.test_head_triton_kernels import TIER_2, Case, case

SIZE = (61, 24, 131)
GRADIENT_ULP = 2**-10
"""Of float16, and of the TensorFloat-32 in which its gradients are multiplied: E of two tiers may round to neighbours there."""
SMALL = (19, 24, 131)


def walk(work: HeadPass, given: Case) -> list[torch.Tensor]:
    """Log-probabilities and gradients, chunk by chunk."""
    logprobs = []
    for rows in row_chunks(0, len(given.hidden), max_rows=work.max_rows):
        block = work.block(rows, want_entropy=True, want_exp=True)
        statistics = row_statistics(block)
        logprobs.append(statistics.logprobs)
        work.add(block, statistics, given.gradient.rows(rows.start, rows.stop))
    return [torch.cat(logprobs), *(value for value in work.gradients() if value is not None)]


@pytest.mark.parametrize("chunk_rows", [8, 1000])
def test_it_agrees_with_the_pass_in_torch(chunk_rows: int, device: torch.device) -> None:
    given = case(device, SMALL, softcap=8.0, temperature=0.9)
    head = replace(given.head, chunk_bytes=int(chunk_rows * SIZE[2] * 4.5))
    options = {"targets": given.targets, "wanted": (True, True, True), "gated": False}
    work = TritonHeadPass(given.hidden, head, **options)
    assert work.max_rows == chunk_rows
    whole = TorchHeadPass(given.hidden, replace(head, chunk_bytes=None), **options)
    for found, wanted in zip(walk(work, given), walk(whole, given), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 6.0, "temperature": 0.8}, {"logit_scale": 0.6, "logits_dtype": torch.bfloat16}], ids=str
)
def test_both_tiers_give_the_same_block_and_gradients(options: dict[str, object], entropy: bool, device: torch.device) -> None:
    given = case(device, (11, 24, 131), dtype=torch.float16, **options)
    # Sums of products that are exact: logits that are rounded to bfloat16 then round alike.
    hidden, weight, bias = (torch.round(8 * value) / 8 for value in (given.hidden, given.head.weight, given.head.bias))
    given = given._replace(hidden=hidden, head=replace(given.head, weight=weight, bias=bias))
    if not entropy:
        given = given._replace(gradient=RowGradient(given.gradient.logprobs))
    found = []
    for tier in (1, 2):
        choice = Choice(tier, TIER_2.tile, measured=False)
        made = {"targets": given.targets, "wanted": (True, True, True), "gated": not entropy, "choice": choice}
        work = TritonHeadPass(hidden, given.head, **made)
        block = work.block(slice(0, 11), want_entropy=True, want_exp=True)
        statistics, exp = row_statistics(block), block.exp[:11].clone()
        work.add(block, statistics, given.gradient)
        found.append(([exp / statistics.total[:, None], *statistics[:2]], work.gradients()))
        scoring = row_statistics(work.block(slice(0, 11), want_entropy=False, want_exp=False))
        assert torch.equal(scoring.logprobs, statistics.logprobs)
    (made, gradients), (others, their_gradients) = found
    for one, two in zip(made, others, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-5, atol=4e-6)
    assert_neighbours(gradients, their_gradients)
    assert (made[1] < -6).any()


def assert_neighbours(gradients: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> None:
    """Gradients of float16 inputs by two tiers: equal to float32, but where their type or a GPU's product rounds to float16."""
    for one, two in zip(gradients, others, strict=True):
        rounded = one.is_cuda or one.dtype == torch.float16
        allowed = {"rtol": 2e-5, "atol": 5e-6}
        if rounded:
            allowed = {"rtol": GRADIENT_ULP, "atol": GRADIENT_ULP * two.abs().max().item()}
        torch.testing.assert_close(one, two, **allowed)


def test_the_table_decides_between_the_tiers(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    given, asked = case(device, (11, 24, 131), dtype=torch.float16), []

    def choose(key: Key) -> Choice:
        asked.append(key)
        return TIER_2

    options = {"targets": given.targets, "wanted": (True, True, True), "gated": False}
    first = walk(TritonHeadPass(given.hidden, given.head, **options), given)
    monkeypatch.setattr(head_triton, "choose", choose)
    work = TritonHeadPass(given.hidden, given.head, **options)
    logprobs, *gradients = walk(work, given)
    torch.testing.assert_close(first[0], logprobs, rtol=2e-5, atol=5e-6)
    assert_neighbours(first[1:], gradients)
    assert work._logits is None
    assert [key._replace(arch=0) for key in asked] == [Key(0, "float16", 24, 131, work.max_rows, plain=False)]


@pytest.mark.parametrize(
    "mixed", [(torch.float16, torch.float32), (torch.float32, torch.float16), (torch.float32, torch.float64)]
)
def test_unequal_types_are_multiplied_in_the_wider_one(mixed: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
    given = case(device, SMALL)
    hidden, head = given.hidden.to(mixed[0]), replace(given.head, weight=given.head.weight.to(mixed[1]))
    options = {"targets": given.targets, "wanted": (True, True, True)}
    given = given._replace(gradient=RowGradient(given.gradient.logprobs))
    found = walk(TritonHeadPass(hidden, head, **options), given)
    wanted = walk(TorchHeadPass(hidden.float(), replace(head, weight=head.weight.float()), **options), given)
    assert found[1].dtype == hidden.dtype
    assert found[2].dtype == found[3].dtype == torch.float32
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.float(), two, rtol=1e-3 if one.dtype == torch.float16 else 2e-5, atol=5e-6)


def test_operands_may_be_rounded_of_what_is_kept_in_float32(device: torch.device) -> None:
    given = case(device, SMALL)
    options = {"targets": given.targets, "wanted": (True, True, True)}
    given = given._replace(gradient=RowGradient(given.gradient.logprobs))
    work = TritonHeadPass(given.hidden, replace(given.head, operand_dtype=torch.bfloat16), **options)
    found = walk(work, given)
    assert work._weight.dtype == work._hidden.dtype == work._exp_dtype == torch.bfloat16
    assert {value.dtype for value in found} == {torch.float32}, "no gradient is rounded"
    short = replace(given.head, weight=given.head.weight.bfloat16())
    expected = walk(TritonHeadPass(given.hidden.bfloat16(), short, **options), given)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1].float(), rtol=2**-7, atol=0)  # the interpreter cuts what a GPU rounds
    assert torch.equal(found[2], expected[2])


def test_strided_inputs_are_read_where_they_are(device: torch.device) -> None:
    given = case(device, SMALL)
    options = {"targets": given.targets, "wanted": (True, True, True), "gated": False}
    expected = walk(TritonHeadPass(given.hidden, given.head, **options), given)
    hidden, weight = (value.repeat_interleave(2, 1)[:, ::2] for value in (given.hidden, given.head.weight))
    targets = given.targets.repeat_interleave(2)[::2]
    assert not hidden.is_contiguous()
    head = replace(given.head, weight=weight)
    found = walk(TritonHeadPass(hidden, head, targets=targets, wanted=(True, True, True), gated=False), given)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_only_what_is_wanted_is_made(device: torch.device) -> None:
    given = case(device, SMALL)
    everything = walk(TritonHeadPass(given.hidden, given.head, targets=given.targets, wanted=(True,) * 3, gated=False), given)
    for index in range(3):
        wanted = tuple(index == other for other in range(3))
        work = TritonHeadPass(given.hidden, given.head, targets=given.targets, wanted=wanted, gated=False)
        _, found = walk(work, given)
        assert torch.equal(found, everything[1 + index])
        assert [value is not None for value in work.gradients()] == list(wanted)


def test_no_rows_give_zero_gradients(device: torch.device) -> None:
    given = case(device, SIZE)
    work = TritonHeadPass(given.hidden[:0], given.head, targets=given.targets[:0], wanted=(True, True, True))
    block = work.block(slice(0, 0), want_entropy=True, want_exp=True)
    work.add(block, row_statistics(block), RowGradient(given.gradient.logprobs[:0], given.gradient.entropy[:0]))
    for gradients in (
        work.gradients(),
        TritonHeadPass(*given[:2], targets=given.targets, wanted=(False, True, True)).gradients(),
    ):
        assert all((value == 0).all() for value in gradients if value is not None)
        assert gradients[1].shape == given.head.weight.shape
        assert gradients[2].shape == given.head.bias.shape


def test_blocks_share_one_buffer_and_scoring_makes_none(device: torch.device) -> None:
    given = case(device, SIZE)
    head = replace(given.head, chunk_bytes=int(16 * SIZE[2] * 4.5))
    work = TritonHeadPass(given.hidden, head, targets=given.targets)
    assert work.block(slice(0, 16), want_entropy=False, want_exp=False).exp is None
    assert work._exp is None
    exps = [work.block(slice(start, start + 16), want_entropy=True, want_exp=True).exp for start in (0, 16, 32)]
    assert len({exp.data_ptr() for exp in exps}) == 1
    assert all(exp.stride(0) % 16 == 0 and exp.shape == (16, SIZE[2]) for exp in exps)
    assert work._logits.shape[0] == 8
    assert work.block(slice(0, 16), want_entropy=False, want_exp=True).weighted is None


def test_bytes_are_divided_between_e_and_logits() -> None:
    head = LMHead(torch.empty(151_936, 2048, device="meta"), chunk_bytes=80 * 2**30 // 32)
    cuda = torch.device("cuda")
    shape = _chunk_shape(head, cuda, bytes_per_exp=2)
    assert shape == (7040, 768)
    assert 0.95 * head.chunk_bytes < 151_936 * (2 * shape.max_rows + 4 * shape.logit_rows) <= head.chunk_bytes
    assert [rows.stop - rows.start for rows in row_chunks(0, 16_384, max_rows=shape.max_rows)] == [5504, 5504, 5376]
    assert _chunk_shape(replace(head, chunk_bytes=1), cuda, bytes_per_exp=2) == (8, 8)


def test_float32_products_keep_their_precision_and_settings_come_back() -> None:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    torch.set_float32_matmul_precision("high")
    try:
        with _products_in("ieee"):
            assert settings.fp32_precision == "ieee"
        assert settings.fp32_precision == "tf32"
        assert settings.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
        settings.fp32_precision = before


def test_calls_to_compile_ahead_launch_on_nothing(launches_of: Callable[..., list[Launch]]) -> None:
    names = [name for name in vars(head_triton) if name.endswith("_kernel")]
    assert len(names) == 4
    launched = launches_of(head_triton, names)
    for call in aot_calls().values():
        dhidden, dweight, dbias = call()
        assert dhidden.device.type == "meta"
        assert dweight.dtype == torch.float32
        assert dbias is None or dbias.shape == dweight.shape[:1]
    assert {name for name, *_ in launched} == set(names)
    kinds = {(flags["ROUNDED"], flags["SOFTCAP"], flags["GATED"]) for name, _, flags in launched if "rows_fwd" in name}
    assert kinds == {(False, False, False), (False, True, True), (True, True, False)}
    assert {flags["SOFTCAP"] for name, _, flags in launched if "entropy" in name} == {False, True}
