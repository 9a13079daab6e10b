"""Sharding over a group of one rank: all but the number of shards is at work. Several ranks: ``tests/train/distributed``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

from grpo_fast.config import Config, ConfigError
from grpo_fast.metrics import PhaseTimer
from grpo_fast.ops import LMHead, token_logprob
from grpo_fast.train.distributed import World
from grpo_fast.train.optim import build_optimizer
from grpo_fast.train.policy import Policy
from grpo_fast.train.policy_source import PolicySource
from grpo_fast.train.reference import build_reference
from grpo_fast.train.results import UpdateResult
from grpo_fast.train.sharding import (
    ShardedPolicy,
    load_sharded,
    load_sharded_optimizer,
    load_whole_optimizer,
    save_optimizer,
    spread,
)
from grpo_fast.train.step import Learner
from grpo_fast.types import Group
from tests.cuda_on_host.build import build_torch_device
from tests.cuda_on_host.shards import squared, updated

ROOT = Path(__file__).parents[2]
MakePolicy = Callable[..., Policy]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def make_policy(request: pytest.FixtureRequest, tiny_policy: MakePolicy, sizes: dict[str, Any]) -> Callable[[], Policy]:
    def make() -> Policy:
        torch.manual_seed(3)
        return tiny_policy(LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=request.param)))

    return make


def settings(**changes: Any) -> Config:
    return Config.parse(
        {"max_completion_length": 8, "adam_epsilon": 1e-4, "learning_rate": 1e-2, "fsdp": "full_shard", "device": "cpu"}
        | changes
    )


class Bench:
    """A learner over a policy, sharded or not."""

    def __init__(self, policy: Policy, config: Config, reference: Policy | None = None) -> None:
        self.policy = policy
        self.optimizer = build_optimizer(policy.model, config)
        self.learner = Learner(config, policy, self.optimizer, reference=reference)

    def update(self, groups: list[Group]) -> UpdateResult:
        return self.learner.update(groups, learning_rate=1e-2, timer=PhaseTimer())

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.policy.whole_model().named_parameters()}


@pytest.fixture
def groups(make_group: Callable[..., Group]) -> list[Group]:
    return [make_group(0, [1.0, 0.0, 0.5, 0.0]), make_group(1, [1.0] * 4), make_group(2, [0.0, 0.5, 1.0, 0.25])]


@pytest.mark.parametrize(
    ("fsdp", "parallel"), [("full_shard", False), ("full_shard", True), ("shard_grad_op", False), ("hybrid_shard", True)]
)
def test_updates_are_those_of_the_whole_policy(
    fsdp: str, parallel: bool, world: World, make_policy: Callable[[], Policy], groups: list[Group]
) -> None:
    config = settings(
        fsdp=fsdp,
        fsdp_parallel_head=parallel,
        beta=0.05,
        num_iterations=2,
        tokens_per_microbatch=30,
        keep_dead_rows_for_metrics=True,
    )
    whole = Bench(make_policy(), config, make_policy())
    sharded = Bench(
        ShardedPolicy(make_policy(), make_policy(), config=config, world=world),
        config,
        ShardedPolicy(make_policy(), None, config=config, world=world),
    )
    before = whole.weights()
    for _ in range(3):
        assert sharded.update(groups).metrics == pytest.approx(whole.update(groups).metrics, rel=1e-5, abs=1e-7)
    expected = whole.weights()
    assert sharded.weights().keys() == expected.keys()
    for name, value in sharded.weights().items():
        assert (value - expected[name]).abs().max() < 1e-6
        assert (expected[name] - before[name]).abs().max() > 1e-3
    assert all(isinstance(parameter, DTensor) for parameter in sharded.policy.model.parameters())


def test_the_gradients_norm_is_taken_of_all_shards_at_once(
    world: World, make_policy: Callable[[], Policy], groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(ShardedPolicy(make_policy(), None, config=settings(), world=world), settings())
    norms, norm_of_all = [], torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda *given: norms.append(norm_of_all(*given)) or norms[-1])
    bench.update(groups)
    assert [len(of_each) for of_each in norms] == [len(list(bench.policy.model.parameters()))]


def test_the_head_is_whole_where_it_is_asked_for(world: World, make_policy: Callable[[], Policy]) -> None:
    policy = ShardedPolicy(make_policy(), None, config=settings(), world=world)
    true = make_policy().head(1.0).weight
    assert isinstance(policy.head(1.0).weight, DTensor)
    with policy.whole_head(trains=True):
        weight = policy.head(0.5).weight
        assert torch.equal(weight, true)
        assert weight.requires_grad
        weight.sum().backward()
    assert isinstance(policy.head(1.0).weight, DTensor)
    assert policy.head(1.0).weight.grad.full_tensor().unique().tolist() == [1.0]
    with policy.whole_head(trains=False):
        assert not policy.head(1.0).weight.requires_grad


def test_bfloat16_is_computed_in_and_float32_kept(
    world: World, tiny_policy: MakePolicy, groups: list[Group], sizes: dict[str, Any]
) -> None:
    def make() -> Policy:
        torch.manual_seed(3)
        model = LlamaForCausalLM(LlamaConfig(**sizes))
        return Policy(model, tiny_policy().tokenizer, autocast_dtype=torch.bfloat16)

    config = settings()
    whole = Bench(make(), config)
    sharded = Bench(ShardedPolicy(make(), make(), config=config, world=world), config)
    expected, found = whole.update(groups).metrics, sharded.update(groups).metrics
    assert found["loss"] == pytest.approx(expected["loss"], abs=2e-2)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-2)
    assert {weight.dtype for weight in sharded.weights().values()} == {torch.float32}


@pytest.mark.parametrize("kind", [{}, {"offload_optimizer": True}, {"weights_dtype": "bfloat16", "dtype": "bfloat16"}])
def test_the_optimizer_goes_between_whole_and_sharded(
    kind: dict[str, Any], world: World, make_policy: Callable[[], Policy], groups: list[Group], tmp_path: Path
) -> None:
    config = settings(**kind)

    def make() -> Policy:
        policy = make_policy()
        policy.model.to(getattr(torch, config.weights_dtype))
        return policy

    def sharded() -> Bench:
        return Bench(ShardedPolicy(make(), make(), config=config, world=world), config)

    def moments(bench: Bench) -> dict[str, torch.Tensor]:
        states = zip(dict(bench.policy.model.named_parameters()), bench.optimizer.state.values(), strict=True)
        return {f"{name}.{key}": value for name, state in states for key, value in state.items()}

    first = sharded()
    save_optimizer(first.policy, first.optimizer, tmp_path / "none")
    assert not (tmp_path / "none").exists(), "there is nothing before the first step"
    load_sharded_optimizer(first.policy, first.optimizer, tmp_path / "none")
    first.update(groups)
    first.update(groups)
    save_optimizer(first.policy, first.optimizer, tmp_path / "shards")

    whole = Bench(make(), config)
    load_sharded_optimizer(whole.policy, whole.optimizer, tmp_path / "shards")
    torch.save(whole.optimizer.state_dict(), tmp_path / "whole.pt")
    again = sharded()
    load_whole_optimizer(again.policy, again.optimizer, tmp_path / "whole.pt")
    for bench in (whole, again):
        assert {float(state["step"]) for state in bench.optimizer.state.values()} == {2.0}
        for true, state in zip(first.optimizer.state.values(), bench.optimizer.state.values(), strict=True):
            assert state.keys() == true.keys()
            for name in state.keys() - {"step"}:
                found = state[name].full_tensor() if isinstance(state[name], DTensor) else state[name]
                assert torch.equal(found, true[name].full_tensor())
    assert all(isinstance(state["exp_avg"], DTensor) for state in again.optimizer.state.values())
    assert moments(whole).keys() == moments(again).keys()


def test_saved_weights_come_back_bit_by_bit(world: World, make_policy: Callable[[], Policy], tmp_path: Path) -> None:
    policy = ShardedPolicy(make_policy(), make_policy(), config=settings(), world=world)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.7)
    expected = {name: value.clone() for name, value in policy.whole_model().named_parameters()}
    policy.reading(world).once(lambda: policy.save(tmp_path))
    other = ShardedPolicy(make_policy(), make_policy(), config=settings(), world=world)
    other.load_weights(tmp_path)
    assert all(torch.equal(value, expected[name]) for name, value in other.whole_model().named_parameters())


@pytest.mark.parametrize("kind", [Gemma3Config, OPTConfig])
def test_a_model_comes_back_that_sees_or_goes_around_the_hooks_of_its_decoder(
    kind: type, world: World, sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    sees = {"vision_config": small | {"intermediate_size": 16, "image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4}
    options = {"text_config": sizes} | sees if kind is Gemma3Config else sizes | {"ffn_dim": 48, "word_embed_proj_dim": 32}
    torch.manual_seed(3)
    true = AutoModelForCausalLM.from_config(kind(**options))
    true.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    source = PolicySource(settings(model=str(tmp_path / "model"), rollout="transformers"))
    policy = load_sharded(source, None, config=source.config, world=world)
    policy.reading(world).once(lambda: policy.save(tmp_path / "saved"))
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.zero_()
    policy.load_weights(tmp_path / "saved")
    found = {name: cast("DTensor", weight).full_tensor() for name, weight in policy.model.named_parameters()}
    assert all(torch.equal(found[name], weight) for name, weight in true.named_parameters())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ is installed")
@pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch is built for CUDA, and takes its own word for devices")
def test_shards_of_a_gpu_may_lie_in_the_hosts_memory(tiny_model: Path, tmp_path: Path) -> None:
    shared = {"model": str(tiny_model), "max_completion_length": 8, "dtype": "float32", "fsdp": "full_shard"}
    kinds = [{}, {"fsdp_offload_params": True}, {"fsdp_offload_params": True, "fsdp_parallel_head": True}]
    given = json.dumps([shared | {"device": "cuda"} | kind for kind in kinds])
    command = [sys.executable, "-m", "tests.cuda_on_host.shards", str(build_torch_device(tmp_path / "device.so")), given]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    told = [line for line in done.stderr.splitlines() if "registered at" not in line]  # PyTorch lists all its kernels
    assert done.returncode == 0, "\n".join(told[-60:])
    runs = json.loads(done.stdout.splitlines()[-1])

    config = Config.parse(shared | {"device": "cpu", "fsdp": "no_shard"})
    whole = PolicySource(config).load()
    expected = updated(whole, config)
    for kind, run in zip(kinds, runs, strict=True):
        assert run["shards"] == ["cpu" if kind else "cuda"], kind
        assert run["gathered"] == ["cuda"], kind
        assert run["waits"] == (["of/tolist"] if kind.get("fsdp_parallel_head") else []), kind
        for found, true in zip(run["metrics"], expected, strict=True):
            assert found == pytest.approx(true, rel=1e-4, abs=1e-6), kind
        assert run["squared"] == pytest.approx(squared(whole.model), rel=1e-6), kind


def test_what_is_not_sharded_stays_as_it_is(world: World, tiny_model: Path) -> None:
    config = settings(fsdp="no_shard", model=str(tiny_model))
    whole, read = spread(PolicySource(config), config=config, world=world)
    assert read is whole
    assert not whole.sums_gradients
    assert whole.whole_model() is whole.model


@pytest.mark.parametrize("streams", [True, False])
def test_no_model_is_loaded_whole_but_a_mirror(
    streams: bool, world: World, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(model=str(tiny_model), rollout="transformers")
    source = PolicySource(config)
    before = {name: value.detach().clone() for name, value in source.load().model.named_parameters()}
    monkeypatch.setattr(source, "load", None)
    policy, read = spread(source, config=config, world=world, streams=streams)
    assert (read is policy) == streams
    for name, value in policy.model.named_parameters():
        assert isinstance(value, DTensor)
        assert value.requires_grad
        assert torch.equal(value.full_tensor(), before[name])
    if not streams:
        assert all(torch.equal(value, before[name]) for name, value in read.model.named_parameters())
        assert not any(value.requires_grad or isinstance(value, DTensor) for value in read.model.parameters())
        assert policy.whole_model() is read.model


def test_a_damaged_file_is_told_as_where_nothing_is_sharded(world: World, tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    config = settings(model=str(broken), rollout="transformers")
    for streams in (True, False):
        with pytest.raises(ConfigError, match=r"cannot load model .*broken"):
            spread(PolicySource(config), config=config, world=world, streams=streams)


@pytest.fixture
def biased_model(sizes: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """Directory of a model whose head has a bias."""
    given = {name: value for name, value in sizes.items() if name != "head_dim"}
    model = PhiForCausalLM(PhiConfig(**given, tie_word_embeddings=False))
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("model", "dtype"), [("tiny", "float32"), ("tiny", "bfloat16"), ("biased", "bfloat16")])
def test_a_reference_in_the_type_of_computation_scores_as_the_policy_does(
    model: str, dtype: str, world: World, tiny_model: Path, biased_model: Path, groups: list[Group]
) -> None:
    directory = biased_model if model == "biased" else tiny_model
    config = settings(model=str(directory), rollout="transformers", dtype=dtype, beta=0.1)
    source = PolicySource(config)
    policy, _ = spread(source, config=config, world=world)
    reference = cast("Policy", build_reference(source, policy, config=config, world=world))
    kept = "float32" if model == "biased" else dtype
    assert {value.dtype for value in reference.model.parameters()} == {getattr(torch, kept)}
    assert {value.dtype for value in policy.model.parameters()} == {torch.float32}
    assert Bench(policy, config, reference).update(groups).metrics["kl"] == 0.0


def test_a_head_that_only_scores_is_gathered_in_the_type_of_its_products(world: World, biased_model: Path) -> None:
    config = settings(model=str(biased_model), rollout="transformers", dtype="bfloat16")
    policy, _ = spread(PolicySource(config), config=config, world=world)
    hidden, scores, kinds = torch.randn(9, 32).bfloat16(), [], []
    for trains in (True, False):
        with policy.whole_head(trains=trains):
            head = cast("LMHead", policy.head(0.7))
            scores.append(token_logprob(hidden, head, targets=torch.arange(9))[0].detach())
            kinds.append([head.weight.dtype, cast("torch.Tensor", head.bias).dtype])
    assert kinds == [[torch.float32, torch.float32], [torch.bfloat16, torch.float32]]
    assert torch.equal(*scores)


def test_a_mirror_has_the_type_that_it_computes_in_and_files_that_of_the_shards(
    world: World, tiny_model: Path, tmp_path: Path
) -> None:
    config = settings(model=str(tiny_model), rollout="transformers", dtype="bfloat16")
    policy, read = spread(PolicySource(config), config=config, world=world)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(1e-3)
    true = {name: value.full_tensor() for name, value in cast("Any", policy.model).named_parameters()}
    for name, value in policy.whole_model().named_parameters():
        assert torch.equal(value, true[name].bfloat16())
    assert read.model is policy.whole_model()
    policy.reading(world).once(lambda: policy.save(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], value) and value.dtype == torch.float32 for name, value in true.items())


@pytest.mark.parametrize("fsdp", ["full_shard", "shard_grad_op"])
def test_the_reference_of_saved_adapters_is_what_they_were(
    fsdp: str, world: World, tiny_model: Path, tmp_path: Path, groups: list[Group]
) -> None:
    config = settings(model=str(tiny_model), use_peft=True, lora_r=4, beta=0.05, fsdp=fsdp)
    saved = PolicySource(config).load()
    torch.manual_seed(5)
    for name, weight in saved.model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.2)
    saved.save(tmp_path)
    config = settings(model=str(tmp_path), use_peft=True, beta=0.05, fsdp=fsdp)
    source = PolicySource(config)
    policies = [source.load(), spread(source, config=config, world=world)[0]]
    whole, sharded = (
        Bench(policy, config, cast("Policy", build_reference(source, policy, config=config, world=world)))
        for policy in policies
    )
    for step in range(3):
        found = sharded.update(groups).metrics
        assert found == pytest.approx(whole.update(groups).metrics, rel=1e-4, abs=1e-7)
        assert (found["kl"] < 1e-7) == (step == 0)
