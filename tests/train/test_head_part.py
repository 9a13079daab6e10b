"""A head in one part. In several: ``tests/train/distributed``."""

from __future__ import annotations

import pytest
import torch

from grpo_fast.config import ConfigError
from grpo_fast.ops import Kept, LMHead, LossBatch, LossSpec, fused_grpo
from grpo_fast.train.head_part import HeadPart, first_token_of, head_logprobs, head_loss, head_scores

VOCABULARY = 19


pytestmark = pytest.mark.usefixtures("group_of_one")


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
            scores = head_scores(hidden, head, targets=targets)
        assert torch.equal(scores[0], logprobs)
        assert torch.equal(scores[1], result.entropy)
        values = [result.loss, result.metrics.values, result.logprobs, result.entropy, logprobs, hidden.grad]
        found.append(values + ([] if frozen else [own.grad]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert found[0][5].abs().max() > 1e-3


def test_the_loss_over_kept_tokens_is_that_of_a_head_without_the_others() -> None:
    """All rows keep the same tokens, so that a smaller vocabulary says the same."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = torch.tensor([2, 3, 5, 7, 11])
    targets = torch.randint(5, (30,), generator=generator)
    rows, weight = torch.randn(30, 8, generator=generator), torch.randn(VOCABULARY, 8, generator=generator)
    others = [vocabulary[vocabulary != vocabulary[target]] for target in targets]
    token_ids = torch.cat([torch.cat([vocabulary[target, None], rest]) for target, rest in zip(targets, others, strict=True)])
    kept = Kept(token_ids, torch.full((30,), 5))
    batch = LossBatch(
        torch.arange(30) // 10,
        torch.tensor([1.0, -0.5, 0.2]),
        torch.full((3,), 1 / 30),
        old_logprobs=-1.5 + torch.rand(30, generator=generator),
        ref_logprobs=-1.5 + torch.rand(30, generator=generator),
        num_items_in_batch=30.0,
    )
    spec = LossSpec(beta=0.1, entropy_coef=0.02)
    hidden, own = rows.clone().requires_grad_(), weight.clone().requires_grad_()
    found = head_loss(hidden, LMHead(own, temperature=0.7), targets=vocabulary[targets], batch=batch, spec=spec, kept=kept)
    small, less = rows.clone().requires_grad_(), weight[vocabulary].clone().requires_grad_()
    expected = fused_grpo(small, LMHead(less, temperature=0.7), targets=targets, batch=batch, spec=spec)
    for result in (found, expected):
        result.loss.backward()
    assert own.grad is not None
    assert not found.logprobs.requires_grad
    again = head_logprobs(hidden.detach(), LMHead(own.detach(), temperature=0.7), targets=vocabulary[targets], kept=kept)
    for one, other in (
        (found.loss, expected.loss),
        (found.metrics.values, expected.metrics.values),
        (found.logprobs, expected.logprobs),
        (again, expected.logprobs),
        (found.entropy, expected.entropy),
        (hidden.grad, small.grad),
        (own.grad[vocabulary], less.grad),
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ConfigError, match="top_p, top_k and min_p need the whole output head on every rank; set fsdp_parallel_head=False"
    ):
        head_logprobs(hidden, HeadPart(LMHead(own), 0), targets=vocabulary[targets], kept=kept)


def test_parts_are_cut_as_fsdp_cuts_rows() -> None:
    for num_ranks in (1, 2, 3, 5):
        parts = torch.arange(VOCABULARY).chunk(num_ranks)
        firsts = [first_token_of(VOCABULARY, num_ranks=num_ranks, rank=rank) for rank in range(num_ranks)]
        assert firsts == [int(part[0]) for part in parts]
    with pytest.raises(ConfigError, match="a vocabulary of 9 leaves one of 4 ranks without a part"):
        first_token_of(9, num_ranks=4, rank=0)
