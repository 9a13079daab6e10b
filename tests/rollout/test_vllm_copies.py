"""A real vLLM server with shared memory of its own, as on another machine or in another container, reached by ssh."""

from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.rollout.served import OWN_MEMORY
from grpo_fast.assets import embedded_model_dir
from grpo_fast.rollout import RolloutError, SamplingParams, WeightSyncError
from grpo_fast.rollout.vllm_client import VLLMServer
from grpo_fast.rollout.vllm_copies import Copies
from grpo_fast.rollout.vllm_engine import VLLMServerEngine, VLLMSettings

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    # vLLM and what it imports use deprecated parts of torch.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

PROMPTS = [[1] + [3 + (7 * position) % 50 for position in range(75)], [1, 4, 5, 6], [1, 9]]
SAMPLING = SamplingParams(max_tokens=8, temperature=0.7)
SETTINGS = VLLMSettings(transport="sparse", bucket_bytes=1_200_000, sync_deadline_s=60, request_deadline_s=60)


class Far(NamedTuple):
    url: str
    port: int
    process: Any

    def shared_memory(self) -> set[str]:
        """What lies in the server's own."""
        engine = max(self.process.processes(), key=lambda each: each.create_time())
        return {path.name for path in Path(f"/proc/{engine.pid}/root/dev/shm").iterdir() if path.name.startswith("grpo_fast")}


@pytest.fixture(scope="module")
def far(serve: Callable[..., Any], ssh_machine: Any) -> Iterator[Far]:
    del ssh_machine
    tried = subprocess.run([*OWN_MEMORY, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no process here can have shared memory of its own: {tried.stderr.strip()}")
    with serve("--max-lora-rank", "4", "--transport", "sparse", inside=OWN_MEMORY) as process:
        yield Far(f"ssh://far:{process.port}", process.port, process)


def embedded_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)


def engine_of(model: Any, far: Far) -> VLLMServerEngine:
    return VLLMServerEngine(model, AutoTokenizer.from_pretrained(embedded_model_dir()), urls=[far.url], settings=SETTINGS)


def test_the_weights_that_changed_reach_it(far: Far, perturb: Callable[..., None], measure_errors: Callable[..., Any]) -> None:
    model = embedded_model()
    engine = engine_of(model, far)
    whole = sum(weight.nbytes for weight in model.parameters())
    head = model.lm_head
    for version in range(1, 21):
        perturb(head, seed=version)
        metrics = engine.sync_weights(model, version)
        answers = engine.generate(PROMPTS, SAMPLING, num_generations=4, seed=version)
        assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).agrees
        assert {completion.weight_version for group in answers for completion in group} == {version}
        assert 0 < metrics["sync/bytes"] < whole / 2
    assert len(far.shared_memory()) == 1
    other = copy.deepcopy(model)
    perturb(other, seed=0)
    second = engine_of(other, far)  # whose memory takes the place of the first one's
    second.close()
    perturb(head, seed=21)
    assert engine.sync_weights(model, 21)["sync/bytes"] == whole
    answers = engine.generate(PROMPTS, SAMPLING, num_generations=4, seed=21)
    assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).agrees
    engine.close()


def test_adapters_reach_it_and_are_removed(
    far: Far, measure_errors: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model: Any = peft.get_peft_model(embedded_model(), peft.LoraConfig(r=4, target_modules=targets))
    engine = engine_of(model.get_base_model(), far)
    num_bytes = sum(weight.nbytes for name, weight in model.named_parameters() if ".lora_" in name)
    [home] = far.shared_memory()
    for version in range(1, 4):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ".lora_" in name:
                    weight.add_(0.05 * torch.randn(weight.shape))
        assert engine.sync_weights(model.get_base_model(), version)["sync/bytes"] == num_bytes
        answers = engine.generate(PROMPTS, SAMPLING, num_generations=4, seed=version)
        assert measure_errors(model, PROMPTS, answers, SAMPLING.temperature).agrees
        assert sum(path.is_dir() for path in _inside(far, home)) == 1

    def refuse(*_: Any) -> None:
        raise RolloutError("no room for another")

    with monkeypatch.context() as patch:
        patch.setattr(VLLMServer, "load_adapter", refuse)
        with pytest.raises(WeightSyncError, match=r"failed in its phase 'finish': no room for another \(attempt 2 of 2\)"):
            engine.sync_weights(model.get_base_model(), 4)
    assert sum(path.is_dir() for path in _inside(far, home)) == 1, "what was not loaded is gone"
    engine.close()
    assert sum(path.is_dir() for path in _inside(far, home)) == 0


def _inside(far: Far, home: str) -> list[Path]:
    engine = max(far.process.processes(), key=lambda each: each.create_time())
    return list(Path(f"/proc/{engine.pid}/root/dev/shm/{home}").iterdir())


def test_one_that_was_started_again_with_other_settings_is_told_as_such(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe, at temperature 1, would not find log-probabilities of another mode."""
    model = embedded_model()
    engine = engine_of(model, far)
    target = engine._vllm
    target.undo()  # as the sync does where a server does not know the memory
    with monkeypatch.context() as patch:
        patch.setattr(target, "_needs", target._needs._replace(dtype=torch.bfloat16))
        told = r"phase 'send': vLLM's server .* cannot be used for training: it computes in float32, the trainer in bfloat16"
        with pytest.raises(WeightSyncError, match=told):
            engine.sync_weights(model, 1)
    engine.sync_weights(model, 1)
    assert target.servers[0].told_sent.startswith(" (2.7 MB went over")
    engine.close()


def test_servers_of_one_machine_share_one_copy(far: Far, tmp_path: Path) -> None:
    servers = [VLLMServer(url, api_key=None, deadline_s=20) for url in (far.url, f"http://127.0.0.1:{far.port}")]
    with (Path("/dev/shm") / f"grpo_fast-test-{os.getpid()}").open("w+b") as file:
        file.truncate(100)
        copies = Copies(servers, file.name, 100)
        Path(file.name).unlink()
    assert copies.path(servers[0]) == copies.path(servers[1]) != file.name
    seen = tmp_path / "seen"
    seen.write_bytes(bytes(100))
    assert Copies(servers, str(seen), 100).path(servers[0]) == str(seen), "the same file is no copy"
    for server in servers:
        server.close()


def test_a_server_that_is_killed_is_named(far: Far) -> None:
    engine = engine_of(embedded_model(), far)
    far.process.kill()
    with pytest.raises(RolloutError, match=rf"vLLM's server ssh://far:{far.port} is gone \(\w+ at /inference/v1/generate\)"):
        engine.generate(PROMPTS, SAMPLING, num_generations=2, seed=0)
    engine.close()
