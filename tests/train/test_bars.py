from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from grpo_fast.train.bars import without_bars

LOADS = """
import sys
from grpo_fast.config import Config
from grpo_fast.train.policy_source import PolicySource

PolicySource(Config(model=sys.argv[1], max_completion_length=8, device="cpu")).load().load_weights(sys.argv[1])
"""


def test_bars_are_as_they_were() -> None:
    before = is_progress_bar_enabled(), are_progress_bars_disabled()
    try:
        for shown, hidden_by_hub in ((True, False), (True, True), (False, True), (False, False)):
            (enable_progress_bar if shown else disable_progress_bar)()
            (disable_progress_bars if hidden_by_hub else enable_progress_bars)()
            with without_bars():
                assert (is_progress_bar_enabled(), are_progress_bars_disabled()) == (False, True)
            assert (is_progress_bar_enabled(), are_progress_bars_disabled()) == (shown, hidden_by_hub)
    finally:
        (enable_progress_bar if before[0] else disable_progress_bar)()
        (disable_progress_bars if before[1] else enable_progress_bars)()


@pytest.mark.slow
def test_a_log_keeps_no_bars_and_a_terminal_shows_them(tiny_model: Path) -> None:
    line = [sys.executable, "-c", LOADS, str(tiny_model)]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    assert "%|" not in done.stderr
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen(line, env=environment, stderr=theirs)
    os.close(theirs)
    told = b""
    while True:
        try:
            told += os.read(ours, 2**16)
        except OSError:  # nobody is left at the other end
            break
    os.close(ours)
    assert process.wait() == 0
    assert b"Loading weights: 100%|" in told
