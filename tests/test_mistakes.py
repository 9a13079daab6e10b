from __future__ import annotations

import errno

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
