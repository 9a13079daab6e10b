from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_fast import GRPOTrainer
from tests.test_cli import SMALL, in_words

Shell = Callable[..., tuple[int, str, str]]


def test_a_failing_reward_is_told_without_a_traceback(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_reward.py").write_text("def score(completions):\n    raise KeyError('[answer]')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, _, err = shell(f"train {SMALL} --reward-funcs broken_reward:score --output-dir run --no-report")
    assert code == 1
    assert "error: reward function 'score' raised KeyError: '[answer]'" in in_words(err)
    assert "Traceback" not in err
    assert (tmp_path / "run" / "checkpoint-0").is_dir()


def test_what_ends_a_run_is_told_before_its_parts_are_closed(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun ends a rank that takes longer to close than another, and with it what that had not said yet."""
    (tmp_path / "broken_reward.py").write_text("def score(completions):\n    raise KeyError('[answer]')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    close = GRPOTrainer.close

    def tell(trainer: GRPOTrainer) -> None:
        print("closing", file=sys.stderr)
        close(trainer)

    monkeypatch.setattr(GRPOTrainer, "close", tell)
    code, _, err = shell(f"train {SMALL} --reward-funcs broken_reward:score --output-dir run --no-report")
    assert code == 1
    assert err.index("error: reward function") < err.index("closing")
    assert err.count("error:") == 1


def test_logits_that_are_not_finite_are_told_without_a_traceback(shell: Shell) -> None:
    code, _, err = shell(f"train {SMALL} --temperature 1e-300 --output-dir run --no-report")
    assert code == 1
    assert "error: the model's logits are not finite within the first 1 tokens of a completion" in in_words(err)
    assert "Traceback" not in err


def test_an_interrupt_before_the_run_begins_does_not_tell_how_to_go_on(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "impatient_reward.py").write_text("raise KeyboardInterrupt\n", encoding="utf-8")
    code, _, err = shell(f"train {SMALL} --reward-funcs impatient_reward:score --output-dir run")
    assert (code, in_words(err)) == (128 + signal.SIGINT, "error: stopped at once; the run in run had not started")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("seed = 3\n", encoding="utf-8")
    code, _, err = shell(f"train {SMALL} --reward-funcs impatient_reward:score --output-dir run --overwrite")
    told = "error: stopped at once; the run in run had not started, and the one that it was to overwrite is as it was"
    assert (code, in_words(err)) == (128 + signal.SIGINT, told)
    assert (tmp_path / "run" / "config.toml").read_text(encoding="utf-8") == "seed = 3\n"


TWICE = """
import os
import signal
import time

def score(completions, **columns):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
"""


def test_a_second_sigterm_ends_a_run_at_once_with_the_exit_code_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text(TWICE, encoding="utf-8")
    command = [sys.executable, "-m", "grpo_fast", "train", *SMALL.split(), "--reward-funcs", "twice:score"]
    done = subprocess.run([*command, "--output-dir", "run"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.endswith("continues from its newest checkpoint, or from the start if it has none\n")
    assert "error: stopped at once; `grpo-fast train --resume run`" in done.stderr


ONCE = """
import os, signal, threading, time
from pathlib import Path

def at_once(completions, **columns):
    os.kill(os.getpid(), signal.SIGTERM)
    return [0.5] * len(completions)

def wait():
    while not Path("run/plots").exists():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)

waiting = threading.Thread(target=wait, daemon=True)

def in_report(completions, **columns):
    if waiting.ident is None:  # one signal, and none to what runs later
        waiting.start()
    return [0.5] * len(completions)
"""


@pytest.mark.parametrize("evaluation", ["", "--eval-steps 2"])
def test_a_signal_before_the_first_step_saves_the_run_and_draws_no_report(
    evaluation: str, shell: Shell, tmp_path: Path
) -> None:
    (tmp_path / "once.py").write_text(ONCE, encoding="utf-8")
    code, out, err = shell(f"train {SMALL} {evaluation} --reward-funcs once:at_once --output-dir run")
    assert (code, "error" in err, "report.html" in out) == (128 + signal.SIGTERM, False, False)
    assert "SIGTERM received after step 0; the run is saved." in in_words(out)
    code, _, err = shell("report run")
    assert (code, "done a step" in err or "no whole step yet" in err) == (1, True)


def test_ctrl_c_in_the_report_says_that_the_run_is_whole(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "once.py").write_text(ONCE, encoding="utf-8")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    try:
        code, _, err = shell(f"train {SMALL} --reward-funcs once:in_report --output-dir run")
    finally:
        signal.signal(signal.SIGINT, before)
    told = "error: stopped at once; the run in run had ended and is saved; `grpo-fast report run` writes its report"
    assert (code, in_words(err)) == (128 + signal.SIGINT, told)
