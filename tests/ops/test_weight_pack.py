"""Buckets hold every weight's bits, cast once, and give them back; what does not fit is named."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_fast.ops import native
from grpo_fast.ops.weight_pack import (
    Bucket,
    LoraFactors,
    Slot,
    pack_weights,
    plan_buckets,
    slot_values,
    unpack_weights,
)

FLOAT8, BF16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
IMPLS = ("native", "torch")
SPECIAL = [0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, 3.4e38, 1e-40, -1e-45, 448.0, 464.0, 1.00390625, 1.01171875]


def some_weights(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(37, 65), (7,), (1, 1), (0, 5), (3, 4, 5), (), (129, 3000), (70001,)]
    dtypes = [F32, BF16, F32, F32, BF16, BF16, F32, F32]
    return [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


def every_float32() -> torch.Tensor:
    """Each sign, exponent and leading bits, at and around the places where rounding turns."""
    heads = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
    tails = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return (heads + tails).int().view(F32).reshape(-1)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()])


@pytest.mark.parametrize("dtype", [F32, BF16, FLOAT8])
def test_native_packs_the_very_bits_of_the_reference(native_library: None, dtype: torch.dtype) -> None:
    weights = [*some_weights(), torch.tensor(SPECIAL), torch.tensor(SPECIAL)[:, None].repeat(1, 3)]
    for bucket in plan_buckets(weights, dtype=dtype, bucket_bytes=100_000):
        assert torch.equal(pack_weights(weights, bucket, impl="native"), pack_weights(weights, bucket, impl="torch"))


@pytest.mark.parametrize("dtype", [BF16, FLOAT8])
def test_every_rounding_is_the_references(native_library: None, dtype: torch.dtype) -> None:
    values = every_float32()
    finite = values[values.isfinite()]
    weights = [values, finite.clamp(-500, 500)[:, None].contiguous(), finite.clamp(-448, 448).reshape(1, -1)]
    (bucket,) = plan_buckets(weights, dtype=dtype)
    native_bytes, plain = (pack_weights(weights, bucket, impl=name) for name in IMPLS)
    for slot in bucket.slots:
        (ours, our_scales), (theirs, their_scales) = slot_values(native_bytes, slot), slot_values(plain, slot)
        assert torch.equal(bits(ours), bits(theirs))
        assert our_scales is None or torch.equal(our_scales, their_scales)
    back = [[torch.empty_like(weight) for weight in weights] for _ in IMPLS]
    for name, into in zip(IMPLS, back, strict=True):
        unpack_weights(plain, bucket, into, impl=name)
    for ours, theirs in zip(*back, strict=True):
        assert torch.equal(bits(ours), bits(theirs)) or torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_what_the_bucket_can_hold_comes_back_bit_for_bit(impl: str, dtype: torch.dtype) -> None:
    weights = [weight.to(dtype) for weight in some_weights()]
    back = [torch.full_like(weight, math.nan) for weight in weights]
    for bucket in plan_buckets(weights, dtype=dtype, bucket_bytes=10_000):
        unpack_weights(pack_weights(weights, bucket, impl=impl), bucket, back, impl=impl)
    for weight, found in zip(weights, back, strict=True):
        assert torch.equal(bits(weight), bits(found))


def test_float8_is_within_its_step_and_norms_stay_bfloat16(impl: str) -> None:
    weights = some_weights()
    (bucket,) = plan_buckets(weights, dtype=FLOAT8)
    assert [slot.dtype for slot in bucket.slots] == [FLOAT8 if weight.dim() > 1 else BF16 for weight in weights]
    back = [torch.empty_like(weight) for weight in weights]
    unpack_weights(pack_weights(weights, bucket, impl=impl), bucket, back, impl=impl)
    for slot, weight, found in zip(bucket.slots, weights, back, strict=True):
        if slot.dtype == FLOAT8 and weight.numel():
            exact, largest = (
                weight.double().view(slot.num_rows, slot.num_columns),
                weight.double().view(slot.num_rows, slot.num_columns).abs().amax(1),
            )
            step = torch.maximum(exact.abs() * 2**-4, (largest / 448)[:, None] * 2**-10) * 1.01
            slack = exact.abs() * 2**-8 if weight.dtype == BF16 else 0.0
            assert ((found.double().view(slot.num_rows, slot.num_columns) - exact).abs() <= step + slack).all()


@pytest.mark.parametrize("merged", [False, True])
def test_float8_rows_without_columns_have_a_scale_of_one(impl: str, merged: bool) -> None:
    weights = [torch.zeros(70_000, 0), torch.ones(2, 3)]
    (bucket,) = plan_buckets(weights, dtype=FLOAT8)
    lora = {0: LoraFactors(torch.ones(4, 0), torch.ones(70_000, 4), 1.0)} if merged else None
    out = pack_weights(weights, bucket, out=torch.full((bucket.num_bytes,), 7, dtype=torch.uint8), lora=lora, impl=impl)
    assert all(
        torch.equal(slot_values(out, slot)[1], torch.full((slot.num_rows,), scale))
        for slot, scale in zip(bucket.slots, (1.0, 1 / 448), strict=True)
    )


@pytest.mark.parametrize("factors", [F32, BF16])
def test_lora_is_merged_in_float32_and_rounded_once(impl: str, factors: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(67, 2100, generator=generator).to(dtype) for dtype in (F32, BF16, F32)]
    lora = {
        i: LoraFactors(
            torch.randn(8, 2100, generator=generator).to(factors), torch.randn(67, 8, generator=generator).to(factors), 0.37
        )
        for i in (0, 1)
    }
    (bucket,) = plan_buckets(weights, dtype=BF16)
    data = pack_weights(weights, bucket, lora=lora, impl=impl)
    for slot, weight in zip(bucket.slots, weights, strict=True):
        found, _ = slot_values(data, slot)
        if slot.weight not in lora:
            assert torch.equal(found, weight.to(BF16))
            continue
        a, b, scale = lora[slot.weight]
        exact = weight.double() + scale * (b.double() @ a.double())
        plain = weight.float() + scale * (b.float() @ a.float())
        budget = 4 * (plain - exact).abs().max()
        half_ulp = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 9)
        assert ((found.double() - exact).abs() <= half_ulp + budget).all()
        assert (found != weight.to(BF16)).double().mean() > 0.9
    again = pack_weights(weights, bucket, lora=lora, impl=impl)
    assert torch.equal(data, again)


def test_lora_goes_into_float8_too(native_library: None) -> None:
    weight, a, b = torch.randn(9, 300), torch.randn(4, 300), torch.randn(9, 4)
    (bucket,) = plan_buckets([weight], dtype=FLOAT8)
    lora = {0: LoraFactors(a, b, 0.5)}
    found = [torch.empty(9, 300) for _ in IMPLS]
    for name, into in zip(IMPLS, found, strict=True):
        unpack_weights(pack_weights([weight], bucket, lora=lora, impl=name), bucket, [into])
    merged = (weight.double() + 0.5 * (b.double() @ a.double())).float()
    for into in found:
        assert (into - merged).abs().max() <= merged.abs().max() * 2**-4


def test_large_buckets_are_written_past_the_caches(native_library: None) -> None:
    weights = [torch.randn(1 << 21), torch.randn(3, 700_001).to(BF16), torch.randn(77)]
    (bucket,) = plan_buckets(weights)
    assert bucket.num_bytes > 8 << 20
    assert torch.equal(pack_weights(weights, bucket, impl="native"), pack_weights(weights, bucket, impl="torch"))


def test_buckets_hold_all_weights_in_order_and_keep_to_their_size() -> None:
    weights = [torch.empty(size) for size in (100, 5000, 10, 10, 4000)]
    buckets = plan_buckets(weights, bucket_bytes=9_000)
    assert [slot.weight for bucket in buckets for slot in bucket.slots] == list(range(5))
    assert [len(bucket.slots) for bucket in buckets] == [1, 1, 3]
    assert buckets[1].num_bytes > 9_000  # alone, as it fits nowhere
    for bucket in buckets:
        ends = [0, *(slot.end_bytes for slot in bucket.slots)]
        assert all(slot.offset_bytes >= end for slot, end in zip(bucket.slots, ends, strict=False))
        assert all(slot.offset_bytes % 256 == 0 for slot in bucket.slots)
        assert ends[-1] <= bucket.num_bytes
    assert plan_buckets([]) == ()


def test_parameters_that_need_gradients_are_packed_without_history(impl: str) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 5))
    (bucket,) = plan_buckets([weight])
    assert not pack_weights([weight], bucket, impl=impl).requires_grad
    unpack_weights(torch.zeros(bucket.num_bytes, dtype=torch.uint8), bucket, [weight], impl=impl)
    assert weight.abs().sum() == 0


def test_what_does_not_fit_is_named(impl: str) -> None:
    weights = [torch.randn(4, 6), torch.randn(8)]
    (bucket,) = plan_buckets(weights)
    out = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
    lora = LoraFactors(torch.ones(2, 6), torch.ones(4, 2), 1.0)
    shared = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
    cases: list[tuple[type[Exception], str, list[torch.Tensor], dict[str, Any]]] = [
        (TypeError, r"weights\[0\] is torch.float16", [weights[0].half(), weights[1]], {}),
        (ValueError, r"weights\[0\] has shape \(6, 4\)", [weights[0].t().contiguous(), weights[1]], {}),
        (ValueError, r"weights\[0\] is not contiguous", [torch.randn(6, 4).t(), weights[1]], {}),
        (ValueError, r"weights\[1\] is on meta", [weights[0], torch.empty(8, device="meta")], {}),
        (ValueError, r"holds weights\[1\], but there are 1", weights[:1], {}),
        (ValueError, r"layout of 512 contiguous bytes", weights, {"out": out[:-1]}),
        (TypeError, "holds bytes, not torch.int8", weights, {"out": out.view(torch.int8)}),
        (ValueError, r"weights\[1\] shares memory", [weights[0], shared[256:288].view(F32)], {"out": shared}),
        (ValueError, r"lora\[5\] belongs to no weight", weights, {"lora": {5: lora}}),
        (ValueError, r"lora\[1\] has a \(2, 6\)", weights, {"lora": {1: lora}}),
        (TypeError, r"lora\[0\] has a in", weights, {"lora": {0: lora._replace(a=lora.a.to(BF16))}}),
        (ValueError, r"lora\[0\].b is not contiguous", weights, {"lora": {0: lora._replace(b=torch.ones(2, 4).t())}}),
    ]
    for error, message, given_weights, options in cases:
        with pytest.raises(error, match=message):
            pack_weights(given_weights, bucket, impl=impl, **options)
    with pytest.raises(ValueError, match="no slots"):
        pack_weights(weights, Bucket((), 0), impl=impl)
    with pytest.raises(ValueError, match=r"dtype=torch.int8; choose"):
        plan_buckets(weights, dtype=torch.int8)
    with pytest.raises(ValueError, match="bucket_bytes=0"):
        plan_buckets(weights, bucket_bytes=0)


def test_more_than_two_to_the_31_elements_are_refused() -> None:
    """A view of one element with a stride of nothing is as large as it says, without its memory."""
    huge = torch.empty(2**31, dtype=BF16, device="meta")
    bucket = Bucket((Slot(0, (2**31,), BF16, 0),), 2**32)
    with pytest.raises(ValueError, match=r"2147483648 elements; a slot takes fewer than 2\^31"):
        pack_weights([huge], bucket, impl="torch")


@settings(max_examples=150)
@given(data=st.data())
def test_the_op_itself_refuses_what_it_cannot_do_safely(native_library: None, data: st.DataObject) -> None:
    """Straight at the compiled op, around the Python checks: it packs rightly or raises, and writes nowhere else."""
    shapes = data.draw(st.lists(st.sampled_from([(3, 4), (5,), (0,), (2, 0), (), (1, 33)]), min_size=1, max_size=4))
    dtypes = [data.draw(st.sampled_from([F32, BF16, torch.float16, torch.int32])) for _ in shapes]
    weights = [torch.ones(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    if data.draw(st.booleans()):
        weights[0] = torch.ones(4, 3).t()
    offsets = data.draw(st.lists(st.integers(-16, 40).map(lambda x: 16 * x), min_size=len(shapes), max_size=len(shapes)))
    formats = data.draw(st.lists(st.integers(-1, 3), min_size=len(shapes) - 1, max_size=len(shapes)))
    lora_a = data.draw(st.sampled_from([[], [torch.ones(2, 4)] * len(shapes), [torch.ones(0)] * len(shapes)]))
    lora_b = data.draw(st.sampled_from([[], [torch.ones(3, 2)] * len(shapes), [torch.ones(0)] * len(shapes)]))
    scales = data.draw(st.sampled_from([[], [1.0] * len(shapes), [1.0]]))
    fence = torch.full((1024,), 0xA5, dtype=torch.uint8)
    bucket = fence[256:768].view(data.draw(st.sampled_from([torch.uint8, torch.int8, torch.uint8, torch.uint8])))
    with suppress(RuntimeError):
        native.call("pack_weights", weights, bucket, offsets, formats, lora_a, lora_b, scales)
        assert all(dtype in {F32, BF16} for dtype in dtypes)
        assert all(offset >= 0 for offset in offsets)
    assert (fence[:256] == 0xA5).all()
    assert (fence[768:] == 0xA5).all()


def test_the_op_passes_torchs_own_check(native_library: None) -> None:
    weights, bucket = [torch.randn(3, 4), torch.randn(5).to(BF16)], torch.zeros(512, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.grpo_fast.pack_weights.default, (weights, bucket, [0, 256], [1, 1], [], [], []))
    torch.library.opcheck(torch.ops.grpo_fast.unpack_weights.default, (bucket, weights, [0, 256], [1, 1]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16, FLOAT8])
def test_a_gpu_packs_the_hosts_bits(native_library: None, dtype: torch.dtype) -> None:
    if not native.has_cuda():
        pytest.skip("the native extension was built without CUDA")
    weights = [*some_weights(), every_float32()[None], torch.randn(4097, 513)]
    lora = {6: LoraFactors(torch.randn(16, 3000), torch.randn(129, 16), 0.25)}
    device_lora = {i: LoraFactors(x.a.cuda(), x.b.cuda(), x.scale) for i, x in lora.items()}
    on_device = [weight.cuda() for weight in weights]
    for bucket in plan_buckets(weights, dtype=dtype, bucket_bytes=1_000_000):
        mine = {i: x for i, x in lora.items() if i in {slot.weight for slot in bucket.slots}}
        theirs = {i: device_lora[i] for i in mine}
        host, device = pack_weights(weights, bucket, lora=mine), pack_weights(on_device, bucket, lora=theirs, impl="native")
        assert torch.equal(host, device.cpu())
        back = [[torch.empty_like(weight) for weight in weights] for _ in range(2)]
        unpack_weights(host, bucket, back[0], impl="native")
        into = [weight.cuda() for weight in back[1]]
        unpack_weights(device, bucket, into, impl="native")
        for slot in bucket.slots:
            assert torch.equal(bits(back[0][slot.weight]), bits(into[slot.weight].cpu()))
