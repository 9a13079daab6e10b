from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from textwrap import dedent

import pytest

from grpo_fast.rollout.shared_memory import SHARED_MEMORY, check_room, reserve, reserve_queues, room


def test_what_does_not_fit_is_told_with_what_is_there(tmp_path: Path) -> None:
    check_room(2**20, "a little", place=tmp_path)
    with pytest.raises(OSError, match=r"has no room for a lot: \d+\.\d MiB are needed, \d+\.\d are left; give more"):
        check_room(room(tmp_path) + 2**40, "a lot", place=tmp_path)
    check_room(2**60, "what goes elsewhere then", place=tmp_path / "none")


def test_pages_are_there_once_they_are_reserved(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(2**20)
        assert os.fstat(file.fileno()).st_blocks == 0
        reserve(file.fileno(), 2**20, "a file")
        assert os.fstat(file.fileno()).st_blocks * 512 >= 2**20
    with (tmp_path / "file").open("rb") as file, pytest.raises(OSError, match="Bad file descriptor"):
        reserve(file.fileno(), 2**21, "what cannot be written to")


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="there is no /dev/shm here")
def test_queues_of_this_process_are_reserved() -> None:
    queue = SharedMemory(create=True, size=2**20)
    try:
        file = SHARED_MEMORY / queue.name
        assert file.stat().st_blocks == 0
        reserve_queues()
        assert file.stat().st_blocks * 512 >= 2**20
    finally:
        queue.close()
        queue.unlink()


def within_small_memory(script: Path, mebibytes: int) -> str:
    """What a script prints that runs where ``/dev/shm`` is small."""
    mount = f"mount -t tmpfs -o size={mebibytes}m tmpfs /dev/shm && exec "
    if sys.platform != "linux" or subprocess.run(["unshare", "-m", "sh", "-c", mount + "true"], check=False).returncode:
        pytest.skip("this user may not mount a small /dev/shm of its own (unshare -m, mount)")
    command = ["unshare", "-m", "sh", "-c", mount + '"$@"', "sh", sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_memory_that_is_full_is_told(tmp_path: Path) -> None:
    script = tmp_path / "full.py"
    script.write_text(
        dedent("""
            from grpo_fast.rollout.shared_memory import reserve

            with open("/dev/shm/file", "w+b") as file:
                reserve(file.fileno(), 2**19, "half of it")
                try:
                    reserve(file.fileno(), 2**21, "twice as much")
                except OSError as error:
                    print(error)
        """),
        encoding="utf-8",
    )
    told = within_small_memory(script, 1)
    assert "/dev/shm has no room for twice as much: 2.0 MiB are needed, " in told
    assert "MiB are needed, 0.0 are left" in told or "MiB are needed, 0.5 are left" in told


FILLED_UP = """
import os

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_fast.assets import embedded_model_dir
from grpo_fast.rollout import SamplingParams, WeightSyncError
from grpo_fast.rollout.shared_memory import room
from grpo_fast.rollout.vllm_engine import VLLMEngine, VLLMSettings


def fill():
    with open("/dev/shm/other", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, room())


if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    settings = VLLMSettings(own_process=True, sync_deadline_s=60, request_deadline_s=60)
    fill()
    try:
        VLLMEngine(model, tokenizer, settings=settings)
    except OSError as error:
        print("full:", error)
    os.unlink("/dev/shm/other")
    engine = VLLMEngine(model, tokenizer, settings=settings)
    fill()
    prompts = [[1, 4 + number, 5] for number in range(40)]
    answers = engine.generate(prompts, SamplingParams(max_tokens=30), num_generations=4, seed=0)
    print("answers:", sum(map(len, answers)))
    try:
        engine.sync_weights(model, 1)
    except WeightSyncError as error:
        print("sync:", error)
    os.unlink("/dev/shm/other")
    print("then:", engine.sync_weights(model, 2)["sync/version"])
    engine.close()
    print("left:", os.listdir("/dev/shm"))
"""


@pytest.mark.vllm
@pytest.mark.slow
def test_memory_that_fills_up_beside_a_run_kills_nothing(tmp_path: Path) -> None:
    """Neither vLLM's processes nor the trainer's."""
    script = tmp_path / "filled.py"
    script.write_text(FILLED_UP, encoding="utf-8")
    told = dict(line.split(": ", 1) for line in within_small_memory(script, 8).splitlines() if ": " in line)
    assert "has no room for vLLM's locks: 1.0 MiB are needed, 0.0 are left; give more" in told["full"]
    assert told["answers"] == "160"
    assert "failed in its phase 'send'" in told["sync"]
    assert "has no room for the next version of the adapters" in told["sync"]
    assert told["then"] == "2.0"
    assert told["left"] == "[]"
