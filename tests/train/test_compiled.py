from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from grpo_fast.config import Config, ConfigError
from grpo_fast.ops import products
from grpo_fast.train.batch import TrainingSequence, build_batch
from grpo_fast.train.compiled import require_compiler
from grpo_fast.train.offload import HostActivations
from grpo_fast.train.policy import Policy
from grpo_fast.train.policy_source import PolicySource

pytestmark = [  # torch's compiler uses what torch deprecates, and hides a warning of its own too late for an error
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def sequences_of(lengths: tuple[int, ...]) -> list[TrainingSequence]:
    """Two answers to one prompt and one to another."""
    prompts = ((4, 5, 6), (4, 5, 6), (11, 9))
    return [
        TrainingSequence(prompt, tuple(7 + n % 9 for n in range(length)), (-1.0,) * length, 1.0, in_loss=True)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]


def pass_of(policy: Policy, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states, and all gradients as one."""
    policy.model.zero_grad()
    batch = build_batch(sequences_of(lengths), [1.0] * 3, policy.device, layout="packed", shares_prompts=True)
    hidden = policy.scored_hidden_states(batch)
    upstream = torch.randn(
        hidden.shape, generator=torch.Generator().manual_seed(1)
    )  # squares of what a norm gives are constant
    (hidden * upstream).sum().backward()
    return hidden.detach(), torch.cat([w.grad.flatten() for w in policy.model.parameters() if w.grad is not None])


def check_against_uncompiled(compiled: Policy, plain: Policy) -> None:
    for lengths in ((9, 14, 5), (20, 7, 17), (6, 6, 2)):  # no row as long as a head is wide, which torch would take for a rule
        (found, found_gradient), (expected, gradient) = (pass_of(policy, lengths) for policy in (compiled, plain))
        assert (found - expected).norm() <= 1e-6 * expected.norm()
        assert gradient.norm() > 0
        assert (found_gradient - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.fixture
def num_compiled() -> Callable[[], int]:
    """Counts pieces of code that have been compiled since the test began."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return lambda: int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_without_a_compiler_it_is_refused_before_anything_is_read(tiny_config: Callable[..., Config]) -> None:
    from torch._inductor import config as inductor

    nothing = inductor.patch({"cpp.cxx": ("no-such-compiler",)})
    with (
        nothing,
        pytest.raises(ConfigError, match=r"torch_compile=True needs a C\+\+ compiler.*install g\+\+"),
    ):
        PolicySource(tiny_config(torch_compile=True, device="cpu"))


@pytest.mark.slow  # a C++ compiler makes some ten libraries
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_compiled_layers_give_the_same_hidden_states_and_gradients(
    tiny_config: Callable[..., Config], num_compiled: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    require_compiler(torch.device("cpu"))
    monkeypatch.setattr(products, "USES_ONEDNN", True)
    monkeypatch.setattr(products, "_LEAST_WORK", 0)
    config = tiny_config(device="cpu", gradient_checkpointing=True)
    plain, compiled = (PolicySource(config.replace(torch_compile=on)).load() for on in (False, True))
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())
    check_against_uncompiled(compiled, plain)
    made = num_compiled()
    assert 0 < made <= 5, "pieces of one layer serve the other"
    monkeypatch.setattr(compiled, "_waiting", HostActivations(compiled.device))
    check_against_uncompiled(compiled, plain)
    assert num_compiled() == made, "other lengths and hooks must not compile anew"


@pytest.mark.slow  # a C++ compiler makes some ten libraries
def test_adapters_compiled_by_inductor_give_the_same_hidden_states_and_gradients(
    tiny_config: Callable[..., Config], num_compiled: Callable[[], int]
) -> None:
    require_compiler(torch.device("cpu"))
    config = tiny_config(device="cpu", use_peft=True)
    plain, compiled = (PolicySource(config.replace(torch_compile=on)).load() for on in (False, True))
    for policy in (plain, compiled):  # a fresh adapter's second factor is 0, and its first factor's gradient with it
        generator = torch.Generator().manual_seed(0)
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.1, generator=generator)
    check_against_uncompiled(compiled, plain)
    assert num_compiled() > 0


@pytest.mark.slow
def test_adapters_are_compiled_and_sampling_is_left_alone(
    tiny_config: Callable[..., Config], num_compiled: Callable[[], int]
) -> None:
    config = tiny_config(device="cpu", use_peft=True)
    plain, compiled = (PolicySource(config.replace(torch_compile=on)).load() for on in (False, True))
    ids: Any = {"input_ids": torch.arange(4, 12)[None]}
    with torch.compiler.set_stance("default", force_backend="eager"):
        check_against_uncompiled(compiled, plain)
        made = num_compiled()
        assert made > 0
        with torch.no_grad():
            cached = compiled.model(**ids, use_cache=True)
            again = copy.deepcopy(compiled.model)(**ids)
        assert num_compiled() == made
    with torch.no_grad():
        expected = plain.model(**ids).logits
    assert torch.equal(cached.logits, expected)
    assert torch.equal(again.logits, expected)
