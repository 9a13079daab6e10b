"""The specification of the one-pass product, its face, and what it refuses; see test_head_exp_kernels.py for numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from grpo_fast.ops.head_exp import head_exp, head_exp_block, head_exp_obstacle, head_exp_reference, target_logits
from grpo_fast.ops.head_shapes import Tile
from grpo_fast.ops.lm_head import LMHead

TILE = Tile(32, 64, 16, splits=1, num_stages=3, num_warps=4, persistent=True)


def case(device: torch.device, **options: object) -> tuple[torch.Tensor, LMHead, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, 16, generator=generator).half().to(device) for n in (3, 70))
    return rows, LMHead(weight, **options), torch.tensor([0, 69, 5], device=device)


def test_the_reference_is_a_softmax() -> None:
    rows, head, targets = case(torch.device("cpu"), softcap=6.0, temperature=0.8, logit_scale=1.5)
    rows, head = rows.double(), replace(head, weight=head.weight.double())
    u = (rows @ head.weight.T).requires_grad_()
    z = 6.0 * torch.tanh(1.5 * u / 6.0) / 0.8
    exp, sums = head_exp_reference(rows, head, targets=targets, ref=z.detach().gather(1, targets[:, None])[:, 0], gated=True)
    log_p = z.log_softmax(1)
    torch.testing.assert_close(-torch.log1p(sums.others), log_p.detach().gather(1, targets[:, None])[:, 0])
    dz = torch.autograd.grad(-log_p.gather(1, targets[:, None]).sum(), u)[0] / (1.5 / 0.8)
    others = torch.ones_like(exp, dtype=torch.bool).scatter(1, targets[:, None], False)
    torch.testing.assert_close((exp / (1 + sums.others)[:, None])[others], dz[others])


def test_it_compiles_without_a_graph_break(device: torch.device) -> None:
    rows, head, targets = case(device)

    def run(rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return head_exp_block(rows, LMHead(weight), targets=targets, tile=TILE).others.log1p()

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(rows, head.weight, targets), run(rows, head.weight, targets))


def test_no_rows(device: torch.device) -> None:
    rows, head, targets = case(device)
    block = head_exp_block(rows[:0], head, targets=targets[:0], exp=torch.empty(0, 70, device=device), want_entropy=True)
    assert [values.shape for values in block] == [(0,)] * 4


def test_what_tier_2_does_not_take(device: torch.device) -> None:
    rows, head, targets = case(device)
    assert head_exp_obstacle(rows, head) is None
    assert head_exp_obstacle(rows.bfloat16(), replace(head, weight=head.weight.bfloat16())) is None
    wide = replace(head, weight=head.weight.float())
    with pytest.raises(ValueError, match=r"torch.float16 and the weight is torch.float32; .* equal types only; use tier 1"):
        target_logits(rows, wide, targets=targets)
    # The interpreter could multiply them: what it took and a GPU refuses would be tested nowhere.
    with pytest.raises(ValueError, match=r"torch.float32; tier 2 needs tensor cores of 16-bit types; use tier 1"):
        target_logits(rows.float(), wide, targets=targets)
    with pytest.raises(ValueError, match="not contiguous along H"):
        target_logits(rows.T.contiguous().T, head, targets=targets)
    for shape in ((2, 72), (3, 69)):
        with pytest.raises(ValueError, match=r"it must be contiguous along V and have at least 3 rows and 70 columns"):
            head_exp(rows, head, targets=targets, ref=rows[:, 0].float(), exp=torch.empty(shape, device=device))
    with pytest.raises(ValueError, match="must be contiguous along V"):
        head_exp(rows, head, targets=targets, ref=rows[:, 0].float(), exp=torch.empty(70, 3, device=device).T)
    apart = torch.stack((targets, targets), 1)[:, 0]
    biased = replace(head, bias=torch.zeros(70, 2, device=device)[:, 0])
    for changes, message in (
        ({"targets": apart}, r"targets has strides \(2,\)"),
        ({"ref": torch.zeros(3, 2, device=device)[:, 0]}, r"ref has strides \(2,\)"),
        ({"head": biased}, r"bias has strides \(2,\)"),
    ):
        given = {"rows": rows, "head": head, "targets": targets, "ref": torch.zeros(3, device=device)} | changes
        with pytest.raises(ValueError, match=message):
            head_exp(given.pop("rows"), given.pop("head"), **given)
    with pytest.raises(ValueError, match="targets has strides"):
        head_exp_block(rows, head, targets=apart)
