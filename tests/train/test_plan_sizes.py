"""What the loss and the optimiser are said to take is what they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from grpo_fast.config import Config
from grpo_fast.ops import LMHead, LossBatch, LossSpec, fused_grpo
from grpo_fast.ops.products import rows_at_once
from grpo_fast.train.optim import build_optimizer
from grpo_fast.train.plan_sizes import DeviceMemory, ModelSizes, head_bytes, moments, update_bytes
from grpo_fast.train.policy_source import outline_of
from tests.train.real_update import most_held

CPU = DeviceMemory("cpu", 2**34)
MODEL = LlamaConfig(
    vocab_size=8192,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
)

NOTHING: dict[str, Any] = dict.fromkeys(ModelSizes.__dataclass_fields__, 0)


def sizes_of(config: Config, *, dtype: torch.dtype = torch.float32) -> ModelSizes:
    return ModelSizes.of(outline_of(MODEL, config), config, dtype=dtype)


@pytest.mark.parametrize(
    ("num_rows", "dtype", "trained"),
    [(400, torch.float32, True), (5000, torch.float32, True), (400, torch.bfloat16, True), (400, torch.float32, False)],
    ids=["a part of a block", "several blocks", "bfloat16", "frozen"],
)
def test_the_loss_takes_what_is_foretold(num_rows: int, dtype: torch.dtype, trained: bool) -> None:
    config = Config(weights_dtype="bfloat16", dtype="bfloat16") if dtype == torch.bfloat16 else Config(use_peft=not trained)
    foretold = head_bytes(config, sizes_of(config), CPU, num_rows=num_rows, parts=1)
    assert foretold.rows == 8192
    hidden = torch.randn(num_rows, 128, dtype=dtype, requires_grad=True)
    head = LMHead(torch.randn(8192, 128, dtype=dtype, requires_grad=trained))
    tokens = torch.zeros(num_rows, dtype=torch.int64)
    batch = LossBatch(
        sequence_index=tokens, advantages=torch.ones(1), loss_weights=torch.ones(1), num_items_in_batch=float(num_rows)
    )
    real = most_held(lambda: fused_grpo(hidden, head, targets=tokens, batch=batch, spec=LossSpec()))
    gradients = hidden.nbytes + 8192 * 128 * 4 * trained
    assert foretold.passing + gradients == pytest.approx(real, rel=0.05)


def test_a_head_in_parts_has_fewer_rows_and_takes_those_of_all() -> None:
    config = Config()
    whole, part = (head_bytes(config, sizes_of(config), CPU, num_rows=80, parts=parts) for parts in (1, 4))
    assert part.rows == whole.rows // 4
    rows = 4 * 80
    of_products = rows * 128 * 4 + rows_at_once(2048, 2048 * 128 * rows) * (2 * rows + 128) * 4
    assert part.passing == 2 * rows * 128 * 4 + 2 * rows * 2048 * 4 + of_products


def test_blocks_on_a_gpu_are_a_share_of_its_memory() -> None:
    gpu = DeviceMemory("cuda", 32 * 2**24)
    config = Config()
    block = head_bytes(config, sizes_of(config), gpu, num_rows=10**6, parts=1).passing
    rows = 2**24 // (8192 * 4.5) // 8 * 8
    assert block == pytest.approx(rows * 8192 * 4.5 + 2 * rows * 128 * 4)
    adapters = Config(use_peft=True)
    short = head_bytes(adapters, sizes_of(adapters, dtype=torch.bfloat16), gpu, num_rows=10**6, parts=1).passing
    assert short == pytest.approx(block, rel=0.1), "more rows, in as much memory"


@pytest.mark.parametrize(
    "changes", [{}, {"weights_dtype": "bfloat16", "dtype": "bfloat16"}], ids=["fused", "rounded at random"]
)
def test_an_update_makes_what_is_foretold(changes: dict[str, Any]) -> None:
    config = Config(**changes)
    dtype = torch.bfloat16 if changes else torch.float32
    model = torch.nn.Linear(1024, 4096, bias=False, dtype=dtype)
    optimizer = build_optimizer(model, config)

    def update() -> None:
        optimizer.step()

    model.weight.grad = torch.ones_like(model.weight)
    update()
    sizes = ModelSizes(**NOTHING | {"largest": model.weight.numel()})
    real = most_held(update) if changes else 0
    assert real == pytest.approx(update_bytes(config, sizes), rel=0.35)
    state = sum(value.nbytes for value in optimizer.state[model.weight].values() if torch.is_tensor(value) and value.ndim)
    trained = ModelSizes(**NOTHING | {"trained": model.weight.numel()})
    assert moments(config, trained, parts=1) == (state, {})


def test_an_offloaded_optimiser_takes_what_is_foretold() -> None:
    """Its blocks are powers of two: more than the numbers in them."""
    config = Config(offload_optimizer=True)
    model = torch.nn.Sequential(*(torch.nn.Linear(300, rows) for rows in (700, 41, 1000, 333)))
    optimizer: Any = build_optimizer(model, config)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    moments_kept = sum(value.nbytes for state in optimizer._masters.state.values() for value in state.values() if value.ndim)
    shapes = tuple(weight.shape for weight in model.parameters())
    trained = sum(shape.numel() for shape in shapes)
    sizes = ModelSizes(**NOTHING | {"trained": trained, "shapes": shapes})
    foretold = moments(config, sizes, parts=1)
    assert foretold == (0, {"optimiser and float32 weights": moments_kept + optimizer._memory.nbytes})
    assert 16 * trained < foretold[1]["optimiser and float32 weights"] < 22 * trained
    shared = moments(config, sizes, parts=4)[1]["optimiser and float32 weights"]
    assert 4 * trained < shared < 6 * trained
