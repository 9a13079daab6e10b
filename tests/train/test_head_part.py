"""A head in one part. In several: ``test_distributed.py``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from grpo_fast.config import ConfigError
from grpo_fast.ops import LMHead, LossBatch, LossSpec
from grpo_fast.train.head_part import HeadPart, first_token_of, head_logprobs, head_loss

VOCABULARY = 19


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("frozen", [False, True])
def test_the_loss_over_parts_is_that_over_the_whole_head(frozen: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(VOCABULARY, (30,), generator=generator)
    rows, weight = torch.randn(30, 8, generator=generator), torch.randn(VOCABULARY, 8, generator=generator)
    batch = LossBatch(
        torch.arange(30) // 10,
        torch.tensor([1.0, -0.5, 0.2]),
        torch.full((3,), 1 / 30),
        old_logprobs=-3 + torch.rand(30, generator=generator),
    )
    found = []
    for spread in (False, True):
        hidden, own = rows.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        whole = LMHead(own, temperature=0.7)
        head = HeadPart(whole, 0) if spread else whole
        result = head_loss(hidden, head, targets=targets, batch=batch, spec=LossSpec())
        result.loss.backward()
        assert not result.logprobs.requires_grad
        assert (own.grad is None) == frozen
        with torch.no_grad():
            logprobs = head_logprobs(hidden, head, targets=targets)
        values = [result.loss, result.metrics.values, result.logprobs, result.entropy, logprobs, hidden.grad]
        found.append(values + ([] if frozen else [own.grad]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert found[0][5].abs().max() > 1e-3


def test_parts_are_cut_as_fsdp_cuts_rows() -> None:
    for num_ranks in (1, 2, 3, 5):
        parts = torch.arange(VOCABULARY).chunk(num_ranks)
        firsts = [first_token_of(VOCABULARY, num_ranks=num_ranks, rank=rank) for rank in range(num_ranks)]
        assert firsts == [int(part[0]) for part in parts]
    with pytest.raises(ConfigError, match="a vocabulary of 9 leaves one of 4 ranks without a part"):
        first_token_of(9, num_ranks=4, rank=0)
