"""A delta on the old bucket gives the new one bit for bit: for any bits at all, and over real training."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_fast.assets import embedded_model_dir
from grpo_fast.ops import native
from grpo_fast.ops.weight_delta import WeightDelta, apply_delta, checksum_reference, split_delta, weight_delta
from grpo_fast.ops.weight_pack import pack_weights, plan_buckets, slot_values

IMPLS = ("native", "torch")
DTYPES = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32}


def random_bits(count: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count * size,), dtype=torch.uint8, generator=generator).view(DTYPES[size])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def changed_at(old: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    new = old.clone()
    data = new.view(torch.uint8)
    places = torch.rand(len(data), generator=generator) < share
    data[places] ^= 1 << torch.randint(0, 8, (int(places.sum()),), generator=generator).to(torch.uint8)
    return new


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 100_003])
def test_native_finds_what_the_reference_finds(native_library: None, size: int, count: int) -> None:
    old = random_bits(count, size, seed=count)
    for share in (0.0, 0.001, 0.05):
        new = changed_at(old, share, seed=1)
        ours, truth = (weight_delta(old, new, impl=name) for name in IMPLS)
        assert (ours.checksum, ours.num_changed) == (truth.checksum, truth.num_changed)
        assert (ours.indices is None) == (truth.indices is None)
        if ours.indices is not None and truth.indices is not None:
            assert torch.equal(ours.indices, truth.indices)
            assert ours.indices.dtype == torch.int32
        assert same_bits(ours.values, truth.values)


@settings(max_examples=200)
@given(
    size=st.sampled_from([1, 2, 4]),
    flips=st.lists(st.tuples(st.integers(0, 40_000), st.integers(1, 255)), max_size=40),
    count=st.integers(1, 10_000),
    seed=st.integers(0, 2**31),
)
def test_a_delta_on_the_old_bucket_is_the_new_one(
    native_library: None, size: int, flips: list[tuple[int, int]], count: int, seed: int
) -> None:
    old = random_bits(count, size, seed)
    new = old.clone()
    for place, mask in flips:
        new.view(torch.uint8)[place % (count * size)] ^= mask
    delta = weight_delta(old, new, impl="native")
    assert delta.num_changed == int((old.view(torch.uint8) != new.view(torch.uint8)).view(-1, size).any(1).sum())
    bucket = old.clone()
    apply_delta(bucket, delta)
    assert same_bits(bucket, new)
    if delta.indices is not None:
        assert (delta.indices.diff() > 0).all()
        assert delta.num_bytes <= new.nbytes
    if not same_bits(old, new):
        with pytest.raises(ValueError, match="checksum"):
            apply_delta(old.clone(), WeightDelta(torch.empty(0, dtype=torch.int32), new[:0], delta.checksum, 0))


def test_signs_of_zero_and_payloads_of_nan_count(impl: str) -> None:
    old = torch.tensor([0.0, float("nan"), 1.0, float("nan")] * 4)
    new = old.clone()
    new[0] = -0.0
    new.view(torch.int32)[1] += 1
    delta = weight_delta(old, new, impl=impl)
    assert delta.indices is not None
    assert delta.indices.tolist() == [0, 1]


def test_the_whole_bucket_goes_where_it_is_smaller(impl: str) -> None:
    old = torch.zeros(999, dtype=torch.bfloat16)
    for changed, whole in ((0, False), (333, False), (334, True), (999, True)):
        new = old.clone()
        new[:changed] = 1
        delta = weight_delta(old, new, impl=impl)
        assert (delta.indices is None) == whole
        assert delta.num_changed == changed
        assert delta.num_bytes == (new.nbytes if whole else 6 * changed)
        bucket = old.clone()
        apply_delta(bucket, delta)
        assert same_bits(bucket, new)


def test_every_changed_word_changes_the_checksum(impl: str) -> None:
    bucket = random_bits(37, 2, seed=5)
    checksum = weight_delta(bucket, bucket, impl=impl).checksum
    assert checksum == checksum_reference(bucket)
    found = set()
    for at in range(74):
        other = bucket.clone()
        other.view(torch.uint8)[at] ^= 0x80
        found.add(weight_delta(other, other, impl=impl).checksum)
    assert len(found | {checksum}) == 75
    swapped = bucket.clone()
    swapped[:8] = torch.cat((bucket[4:8], bucket[:4]))
    assert weight_delta(swapped, swapped, impl=impl).checksum != checksum


def test_patches_are_in_the_coordinates_of_their_weights(impl: str) -> None:
    weights = [torch.randn(5, 7), torch.randn(3), torch.randn(4, 4)]
    (bucket,) = plan_buckets(weights)
    old = pack_weights(weights, bucket).view(torch.bfloat16)
    weights[0][1, 2], weights[2][3, 3] = 9.0, -9.0
    new = pack_weights(weights, bucket).view(torch.bfloat16)
    patches = split_delta(weight_delta(old, new, impl=impl), bucket)
    assert [(p.weight, p.indices.tolist(), p.values.tolist(), p.full_shape) for p in patches] == [
        (0, [9], [9.0], (5, 7)),
        (2, [15], [-9.0], (4, 4)),
    ]
    with pytest.raises(ValueError, match="holds the whole bucket"):
        split_delta(WeightDelta(None, new, 0, 9), bucket)
    with pytest.raises(ValueError, match="between slots"):
        split_delta(WeightDelta(torch.tensor([36], dtype=torch.int32), new[:1], 0, 1), bucket)
    with pytest.raises(ValueError, match=r"weights\[0\] is torch.bfloat16"):
        split_delta(weight_delta(old.view(torch.int16), new.view(torch.int16), impl=impl), bucket)


@pytest.mark.slow
@pytest.mark.parametrize("learning_rate", [1e-6, 1e-3])
def test_two_hundred_optimiser_steps_arrive_bit_for_bit(native_library: None, learning_rate: float) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    weights = [weight for _, weight in model.named_parameters()]
    (bucket,) = plan_buckets(weights)
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    received = pack_weights(weights, bucket).view(torch.bfloat16)
    sent, bytes_sent, deltas = received.clone(), 0, 0
    for _ in range(200):
        tokens = torch.randint(0, model.config.vocab_size, (4, 12))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        now = pack_weights(weights, bucket).view(torch.bfloat16)
        delta = weight_delta(sent, now)
        apply_delta(received, delta)
        assert same_bits(received, now)
        if delta.indices is not None:
            deltas += 1
            patched = [slot_values(sent.view(torch.uint8), slot)[0].clone() for slot in bucket.slots]
            for patch in split_delta(delta, bucket):
                patched[patch.weight].view(-1)[patch.indices] = patch.values
            assert all(same_bits(p.view(-1), w.detach().bfloat16().view(-1)) for p, w in zip(patched, weights, strict=True))
        bytes_sent += delta.num_bytes
        sent = now
    assert deltas == 200 if learning_rate == 1e-6 else deltas > 0
    assert bytes_sent < 200 * sent.nbytes * (0.1 if learning_rate == 1e-6 else 1.0)


def test_what_does_not_fit_is_named(impl: str) -> None:
    bucket = torch.zeros(8, dtype=torch.bfloat16)
    for error, message, old, new in (
        (TypeError, "old is torch.float32, new is torch.bfloat16", bucket.float(), bucket),
        (TypeError, "torch.float64 have 8 bytes", bucket.double(), bucket.double()),
        (ValueError, r"old has shape \(7,\), new \(8,\)", bucket[:7], bucket),
        (ValueError, r"old has shape \(2, 4\)", bucket.view(2, 4), bucket.view(2, 4)),
        (ValueError, "old is on meta, new on cpu", bucket.to("meta"), bucket),
        (ValueError, r"new is not contiguous \(stride \(2,\)\)", bucket[:4], bucket[::2]),
        (ValueError, "2147483648 elements", *[torch.empty(2**31, dtype=torch.uint8, device="meta")] * 2),
    ):
        with pytest.raises(error, match=message):
            weight_delta(old, new, impl=impl)
    delta = weight_delta(bucket, bucket + 1, impl=impl)
    with pytest.raises(TypeError, match=r"the delta is torch\.bfloat16, the bucket torch\.int16"):
        apply_delta(bucket.view(torch.int16), delta)
    with pytest.raises(ValueError, match=r"a whole bucket \(8,\) for one of \(4,\)"):
        apply_delta(bucket[:4].clone(), delta)
    new = bucket.clone()
    new[7] = 3
    with pytest.raises(ValueError, match="changes element 7 of a bucket of 4"):
        apply_delta(bucket[:4].clone(), weight_delta(bucket, new, impl=impl))


@settings(max_examples=100)
@given(data=st.data())
def test_the_op_itself_refuses_what_it_cannot_do_safely(native_library: None, data: st.DataObject) -> None:
    def bucket() -> torch.Tensor:
        dtype = data.draw(st.sampled_from([torch.int16, torch.int16, torch.uint8, torch.float64]))
        made = torch.ones(data.draw(st.sampled_from([0, 16, 16, 17])), dtype=dtype)
        return data.draw(st.sampled_from([made, made, made[::2], made[None]]))

    old, new, capacity = bucket(), bucket(), data.draw(st.integers(-1, 20))
    with suppress(RuntimeError):
        indices, values, count, _ = native.call("weight_delta", old, new, capacity)
        assert old.dtype == new.dtype
        assert old.shape == new.shape
        assert len(indices) == len(values) == count == 0


def test_the_op_passes_torchs_own_check(native_library: None) -> None:
    old, new = torch.zeros(70, dtype=torch.int16), torch.arange(70, dtype=torch.int16)
    torch.library.opcheck(torch.ops.grpo_fast.weight_delta.default, (old, new, 70))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_gpu_finds_the_hosts_delta(native_library: None, size: int) -> None:
    if not native.has_cuda():
        pytest.skip("the native extension was built without CUDA")
    for count in (1, 17, 4096, 1_000_003):
        old = random_bits(count, size, seed=count)
        for share in (0.0, 1e-4, 0.05, 0.9):
            new = changed_at(old, share, seed=2)
            host, device = weight_delta(old, new), weight_delta(old.cuda(), new.cuda(), impl="native")
            assert (host.checksum, host.num_changed) == (device.checksum, device.num_changed)
            assert same_bits(host.values, device.values.cpu())
            assert (host.indices is None) == (device.indices is None)
            if host.indices is not None and device.indices is not None:
                assert torch.equal(host.indices, device.indices.cpu())
