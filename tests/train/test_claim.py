from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_fast.config import Config, ConfigError
from grpo_fast.run_dir import CONFIG_FILE, LOCK_FILE
from grpo_fast.tasks.task import Task
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.claim import Claim

HOLDS = """
import sys
from grpo_fast.config import Config
from grpo_fast.train.claim import Claim

claim = Claim(Config(output_dir=sys.argv[1], overwrite=True))
claim.open()
print("held", flush=True)
sys.stdin.read()
"""

TRIES = """
import sys
from grpo_fast.config import Config, ConfigError
from grpo_fast.train.claim import Claim

for line in sys.stdin:
    claim = Claim(Config(output_dir=line.strip(), overwrite=True))
    try:
        claim.open()
    except ConfigError as error:
        print(error, flush=True)
    else:
        print("free", flush=True)
    claim.release()
"""
FORKS = """
import os
import sys
from grpo_fast.config import Config
from grpo_fast.train.claim import Claim

claim = Claim(Config(output_dir=sys.argv[1]))
claim.open()
reads, writes = os.pipe()
if os.fork() == 0:
    os.write(writes, b"x")
    sys.stdin.read()
    os._exit(0)
os.read(reads, 1)
print("forked", flush=True)
os._exit(0)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that has the run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    (tmp_path / "run" / CONFIG_FILE).write_text(Config(output_dir=tmp_path / "run").to_toml(), encoding="utf-8")
    yield process
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"Invalid argument|No space left") as caught:
        Claim(Config(output_dir=tmp_path)).open()
    assert caught.value.filename == str(tmp_path)


def test_a_run_that_another_process_has_is_left_alone_until_that_was_killed(
    holder: Any, tmp_path: Path, tiny_config: Callable[..., Config]
) -> None:
    run = tmp_path / "run"
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    in_use = rf"output_dir {run} is in use by process {holder.pid} on \S+; wait until that has ended, end it, or name another"
    for config in (tiny_config(overwrite=True, model="no/such/model"), tiny_config(resume_if_exists=True)):
        with pytest.raises(ConfigError, match=in_use):
            Claim(config).stake(resume=config.resume_if_exists)
    with pytest.raises(ConfigError, match=in_use):
        GRPOTrainer(tiny_config(overwrite=True, model="no/such/model"))  # before anything is read
    with pytest.raises(ConfigError, match=in_use):
        GRPOTrainer.resume(run)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    holder.kill()
    holder.wait()
    claim = Claim(tiny_config(overwrite=True))
    claim.stake(resume=False)
    claim.release()


@pytest.mark.slow
def test_another_process_is_kept_out_until_the_last_claim_of_this_one_is_released(
    tmp_path: Path, tiny_config: Callable[..., Config]
) -> None:
    run = tmp_path / "run"
    (tmp_path / "link").symlink_to(run)
    with subprocess.Popen([sys.executable, "-c", TRIES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:

        def tries() -> str:
            assert other.stdin is not None
            assert other.stdout is not None
            print(run, file=other.stdin, flush=True)
            return other.stdout.readline()

        first, second = Claim(tiny_config()), Claim(tiny_config(output_dir=tmp_path / "link", overwrite=True))
        first.open()
        in_use = f"output_dir {run} is in use by process {os.getpid()} on "
        assert tries().startswith(in_use)
        shutil.copytree(run, tmp_path / "copy")  # as who uploads a run reads all of its files
        assert tries().startswith(in_use)
        second.open()
        second.release()
        assert tries().startswith(in_use)
        second.open()
        first.release()
        assert tries().startswith(in_use)
        second.release()
        assert tries() == "free\n"


@pytest.mark.slow
def test_a_fork_that_outlives_a_run_does_not_hold_it(tmp_path: Path, tiny_config: Callable[..., Config]) -> None:
    command = [sys.executable, "-c", FORKS, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "forked\n"
        assert process.wait() == 0
        claim = Claim(tiny_config())
        claim.open()
        claim.release()


def test_a_directory_that_became_a_run_while_the_model_was_read_is_left_alone(
    tmp_path: Path, tiny_config: Callable[..., Config]
) -> None:
    claim = Claim(tiny_config())
    claim.stake(resume=False)
    assert not (tmp_path / "run").exists(), "nothing is written yet"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG_FILE).touch()
    with pytest.raises(ConfigError, match=r"already holds a run; .*\(in Python: GRPOTrainer.resume, overwrite=True\)"):
        claim.open()
    claim.release()


def test_the_lock_outlives_an_emptied_run_and_is_no_run_itself(tmp_path: Path, tiny_config: Callable[..., Config]) -> None:
    run = tmp_path / "run"
    first = Claim(tiny_config())
    first.open()
    first.release()
    first.release()
    assert [path.name for path in run.iterdir()] == [LOCK_FILE]
    again = Claim(tiny_config())
    again.stake(resume=False)  # what a run leaves that never wrote a file is an empty directory
    (run / CONFIG_FILE).touch()
    (run / "metrics.jsonl").touch()
    replacing = Claim(tiny_config(overwrite=True))
    replacing.stake(resume=False)
    assert (run / LOCK_FILE).read_text(encoding="utf-8").startswith(f"process {os.getpid()} on ")
    number = (run / LOCK_FILE).stat().st_ino
    replacing.open()
    assert {path.name for path in run.iterdir()} == {CONFIG_FILE, LOCK_FILE}
    assert (run / LOCK_FILE).stat().st_ino == number
    replacing.release()


def test_a_file_system_without_locks_is_told_and_stops_nothing(
    tmp_path: Path, tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(number: int) -> Callable[..., None]:
        def flock(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        return flock

    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    claim = Claim(tiny_config())
    claim.stake(resume=False)
    claim.open()
    claim.open()
    claim.release()
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'run'} cannot be locked (No locks available): make sure that no second process works on this run"
    ]
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        Claim(tiny_config()).open()


def test_a_place_that_cannot_be_written_is_told_before_anything_is_loaded(
    tmp_path: Path, tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"^output_dir {tmp_path}/file is a file; name a directory$"):
        Claim(tiny_config(output_dir=tmp_path / "file")).stake(resume=False)
    with pytest.raises(ConfigError, match=rf"/file/a/b cannot be made, because {tmp_path}/file is a file; name a directory$"):
        Claim(tiny_config(output_dir=tmp_path / "file" / "a" / "b")).stake(resume=False)
    asked = []
    monkeypatch.setattr("os.access", lambda place, mode: asked.append(place))  # root may write everywhere
    with pytest.raises(ConfigError, match=rf"/new/run cannot be written \(no permission for {tmp_path}, or a read-only"):
        Claim(tiny_config(output_dir=tmp_path / "new" / "run")).stake(resume=False)
    assert asked == [tmp_path]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("leads", "run"), [("nowhere", "link"), ("nowhere", "link/run"), ("link", "link")])
def test_a_link_to_nowhere_is_told_before_anything_is_loaded(
    leads: str, run: str, tmp_path: Path, tiny_config: Callable[..., Config]
) -> None:
    """As one to a disk that is not mounted."""
    (tmp_path / "link").symlink_to(leads)
    told = rf"^output_dir {tmp_path}/{run} cannot be made: {tmp_path}/link is a link to {leads}, where nothing is; "
    with pytest.raises(ConfigError, match=told):
        Claim(tiny_config(output_dir=tmp_path / run)).stake(resume=False)


@pytest.mark.parametrize(
    ("inside", "named"),
    [
        ({"model": "checkpoint-1"}, "model"),
        ({"base": "checkpoint-1"}, "base model"),
        ({"dataset": "rows.jsonl"}, "dataset"),
        ({"dataset": "gsm8k:checkpoint-1"}, "dataset"),
        ({"forecast_prior": "prior.json"}, "forecast_prior"),
        ({"reward_funcs": "checkpoint-1"}, "reward model"),
        ({"train_dataset": "rows.arrow"}, "train_dataset"),
        ({"eval_dataset": "rows.arrow"}, "eval_dataset"),
    ],
)
def test_a_run_is_not_replaced_by_one_that_begins_from_it(
    inside: dict[str, str], named: str, tmp_path: Path, tiny_config: Callable[..., Config]
) -> None:
    run, link = tmp_path / "run", tmp_path / "link"
    (run / "checkpoint-1").mkdir(parents=True)
    link.symlink_to(run)
    for name in (CONFIG_FILE, "rows.jsonl", "rows.arrow", "prior.json"):
        (run / name).touch()
    (field, value), *_ = inside.items()
    place = value.replace(Path(value.removeprefix("gsm8k:")).name, str(run / value.removeprefix("gsm8k:")))
    given = {field: SimpleNamespace(cache_files=[{"filename": place}])} if field.endswith("_dataset") else {}
    settings: dict[str, Any] = {} if given or field == "base" else {field: (place,) if field == "reward_funcs" else place}
    claim = Claim(tiny_config(**settings, output_dir=link, overwrite=True))
    claim.stake(resume=False)
    with pytest.raises(ConfigError, match=rf"overwrite would delete {link}, where this run's {named} is \({run}/"):
        claim.spare(place if field == "base" else "owner/name", given)
    claim.release()
    assert {path.name for path in run.iterdir()} == {
        CONFIG_FILE,
        LOCK_FILE,
        "checkpoint-1",
        "rows.jsonl",
        "rows.arrow",
        "prior.json",
    }

    other = Claim(tiny_config(**settings, output_dir=tmp_path / "other", overwrite=True))
    other.stake(resume=False)
    other.spare(place if field == "base" else "owner/name", given)


@pytest.mark.slow
def test_the_start_of_a_run_is_still_there_when_it_is_refused(
    tmp_path: Path, tiny_config: Callable[..., Config], letters: Task
) -> None:
    with GRPOTrainer(tiny_config(max_steps=1), task=letters) as trainer:
        trainer.train()
    again = tiny_config(max_steps=1, model=str(tmp_path / "run" / "checkpoint-1"), overwrite=True)
    with pytest.raises(ConfigError, match="overwrite would delete"):
        GRPOTrainer(again, task=letters)
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").is_file()
    with GRPOTrainer(again.replace(output_dir=tmp_path / "other"), task=letters) as trainer:
        assert trainer.train()["step"] == 1
