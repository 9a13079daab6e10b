"""The command in a process of its own, killed and interrupted."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.system.command_line import CommandLine
from benchmarks.system.soak import trace
from grpo_fast.config import Config
from grpo_fast.train.checkpoint import list_checkpoints
from tests.train.trainer.runs import ROWS, events, lines

REWARD = """
import os
import signal
from pathlib import Path

PAUSE = Path(__file__).with_name("pause")

def wait_for_signals(metrics, step, count):
    if not Path(metrics).exists() or Path(metrics).read_bytes().count(b"\\n") < int(step):
        return
    told, tell = os.pipe2(os.O_NONBLOCK)
    os.set_blocking(told, True)
    signal.set_wakeup_fd(tell)  # each signal writes a byte
    PAUSE.unlink()
    for _ in range(int(count)):
        os.read(told, 1)

def vowels(completions, **columns):
    if PAUSE.exists():
        wait_for_signals(*PAUSE.read_text(encoding="utf-8").splitlines())
    return [sum(letter in "aei" for letter in text) / max(1, len(text)) for text in completions]
"""


@pytest.fixture(scope="module")
def command(straight: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, forks: CommandLine) -> tuple[CommandLine, Path]:
    """The command line, and a run that nothing disturbed."""
    home = tmp_path_factory.mktemp("command")
    (home / "tiny_reward.py").write_text(REWARD, encoding="utf-8")
    with (home / "letters.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    settings = {**straight, "dataset": str(home / "letters.jsonl"), "reward_funcs": ("tiny_reward:vowels",)}
    settings |= {"max_steps": 40, "save_steps": 10, "eval_steps": 0, "num_iterations": 1, "beta": 0.0}
    config = Config.parse(settings | {"output_dir": home / "straight"})
    (home / "run.toml").write_text(config.to_toml(), encoding="utf-8")
    forks.home = home
    assert forks.run("train", "--config", "run.toml") == 0, forks.log()
    return forks, home / "straight"


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "before the first step": lambda run: (run / "config.toml").exists(),
    "before the first checkpoint": lambda run: lines(run) >= 4,
    "in the middle of the first checkpoint": lambda run: any(run.glob(".checkpoint-10.partial")),
    "between checkpoints": lambda run: lines(run) >= 15,
    "in the middle of a later checkpoint": lambda run: any(run.glob(".checkpoint-20.partial/optimizer.pt")),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_as_if_nothing_had_been(moment: str, command: tuple[CommandLine, Path]) -> None:
    shell, undisturbed = command
    run = undisturbed.with_name(moment.replace(" ", "-"))
    options = ("train", "--config", "run.toml", "--overwrite", "--output-dir", str(run))
    for _attempt in range(5):  # a moment of milliseconds is missed where the machine is busy
        if shell.run(*options, until=lambda: MOMENTS[moment](run)) == -signal.SIGKILL:
            break
    else:
        pytest.fail("the moment never came")
    assert lines(run) < 40
    assert shell.run("train", "--resume", str(run)) == 0, shell.log()
    assert trace(run) == trace(undisturbed)
    assert [path.name for path in list_checkpoints(run)][-1] == "checkpoint-40"
    assert not list(run.glob(".checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("signals", [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM)])
def test_ctrl_c_once_saves_and_twice_ends_at_once(
    signals: tuple[signal.Signals, ...], command: tuple[CommandLine, Path]
) -> None:
    shell, undisturbed = command
    times = len(signals)
    run = undisturbed.with_name("-".join(("interrupted-by", *(number.name for number in signals))))
    options = ("train", "--config", "run.toml", "--output-dir", str(run))
    pause = run.with_name("pause")
    pause.write_text(f"{run / 'metrics.jsonl'}\n13\n{times}", encoding="utf-8")  # in step 13: there is a row of step 0
    code = shell.run(*options, until=lambda: not pause.exists(), signals=signals)
    told = shell.log()
    assert "Traceback" not in told
    assert f"{signals[0].name} received: what is under way is finished and saved first" in told
    assert code == 128 + signals[0], "a restart loop goes on until it is 0"
    if times == 1:
        assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["signal"] == signals[0].name
        assert events(run)[-1] == "interrupt"
        assert list_checkpoints(run)[-1].name == "checkpoint-13"
    else:
        assert "error: stopped at once; `grpo-fast train --resume" in told
        assert list_checkpoints(run)[-1].name == "checkpoint-10"
    assert shell.run("train", "--resume", str(run)) == 0
    assert trace(run) == trace(undisturbed)
