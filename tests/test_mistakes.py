from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from grpo_fast.cli import app
from grpo_fast.mistakes import in_words, of_file


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --report false", "'false' belongs to no option: a switch takes no value"),
        ("train stray", "'stray' belongs to no option; quote a value that has spaces in it"),
        ("train --reward-range 1", "given was '1'."),
        (
            "train --use-vllm",
            "Unknown option: --use-vllm, a TRL name; here it corresponds to rollout='vllm', or 'vllm-http' for servers",
        ),
        ("train --report_to wandb", "Unknown option: --report_to, a TRL name; here it corresponds to sinks"),
        ("train --lr 1e-5", "Unknown option: --lr; here it corresponds to learning_rate"),
        ("plan --batch-size 8", "Unknown option: --batch-size; here it corresponds to prompts_per_step, the prompts of a step"),
        ("serve embedded --lora", "go after --: grpo-fast serve MODEL -- --lora ..."),
        ("--max-steps 3 train", "--max-steps belongs behind a command, as in `grpo-fast train --max-steps ...`"),
        ("train --reprot", "Unknown option: --reprot. Did you mean --report?"),
        (
            "serve embedded --pipeline-parallel-size=2",
            "go after --: grpo-fast serve MODEL -- --pipeline-parallel-size=2 ...",
        ),
        ("serve embedded --host 0.0.0.0", "--host is refused: the server listens on 127.0.0.1 alone, because"),
        ("serve embedded --logprobs-mode=raw_logprobs", "weight syncs need it; leave it out"),
        ("train --output-dir", "requires an argument"),
        ("train --sync-deadline-s 5min", "sync_deadline_s: Input should be a valid number, unable to parse string as a number"),
        ("train --sync-deadline-s 5min", "(got '5min'); give a plain number of seconds"),
    ],
)
def test_the_value_and_the_fix_are_named(line: str, message: str) -> None:
    with pytest.raises(CycloptsError) as caught:
        app(line.split(), exit_on_error=False, print_error=False)
    assert message in in_words(caught.value)


def test_a_file_that_is_not_there_is_told_without_a_number() -> None:
    with pytest.raises(OSError, match="nosuch") as caught:
        open("nosuch.json")  # noqa: PTH123, SIM115 (never opened)
    assert of_file(caught.value) == "nosuch.json: No such file or directory"
    assert of_file(OSError("a message of its own")) == "a message of its own"
    full = OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")
    assert of_file(full).startswith("runs/a/metrics.jsonl: No space left on device; make room on that disk, then repeat")
    assert of_file(OSError(errno.EROFS, "Read-only file system", "runs/a")).endswith("; name a place on another one")


@pytest.mark.parametrize("line", ["--help", "doctor"])
def test_output_that_finds_no_room_is_told_with_its_file(line: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "grpo_fast", line], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output (/dev/full): No space left on device; make room on that disk")


READS = """
import sys
from pathlib import Path
from grpo_fast.mistakes import of_file
from grpo_fast.config import Config, ConfigError
from grpo_fast.train.checkpoint import check_checkpoint
from grpo_fast.train.claim import Claim
from grpo_fast.train.distributed import World
from grpo_fast.train.handshake import check_directory
from grpo_fast.train.resumable import config_of, takes_up_run

for place in map(Path, sys.argv[1:]):
    for read in (config_of, check_checkpoint):
        try:
            print(read(place))
        except OSError as error:
            print(of_file(error))
    try:
        config = Config(output_dir=place, resume_if_exists=True)
        print(takes_up_run(config))
        try:
            check_directory(config, World())
        except ConfigError as error:
            print(error)
        Claim(config).stake(resume=False)
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_closed_directory_is_told_with_the_way_to_open_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "inner").mkdir(parents=True)
    as_others = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if as_others and shutil.which("setpriv") is None:
        pytest.skip("root enters every directory, and there is no setpriv to take that right away")
    run.chmod(0)
    try:
        told = subprocess.run(
            [*as_others, sys.executable, "-c", READS, str(run), str(run / "inner")], capture_output=True, text=True, check=True
        )
    finally:
        run.chmod(0o700)
    closed, unread, takes, meets, stakes, *inner = told.stdout.splitlines()
    way = f"open {run} with `chmod u+rwX {run}`, or name another place"
    assert closed == f"{run}/config.toml: Permission denied; {way}"
    assert unread == f"{run}/manifest.json: Permission denied; {way}"
    assert takes == "False"
    assert stakes == (f"output_dir {run} cannot be written (no permission for {run}, or a read-only file system); name another")
    assert meets.startswith(f"output_dir {run} cannot be written to ([Errno 13] Permission denied: ")
    assert inner[3].startswith(f"output_dir {run}/inner cannot be written to ([Errno 13] Permission denied: ")
    assert inner[0] == f"{run}/inner/config.toml: Permission denied; {way}"
    assert inner[4].startswith(f"output_dir {run}/inner cannot be written (no permission for {run}, or")
