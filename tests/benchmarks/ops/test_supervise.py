"""A worker that dies or hangs is started again without what it was trying."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks.ops.supervise import _watch, marker, sign, supervise

WORKER = """
import json, os, sys, time
from pathlib import Path
path, log = Path(sys.argv[1]), Path(sys.argv[2])
arguments = sys.argv[3:]
log.open("a").write(json.dumps(arguments) + chr(10))
bans = [x for x, flag in zip(arguments[1:], arguments) if flag == "--ban"]
skips = [x for x, flag in zip(arguments[1:], arguments) if flag == "--skip"]
def trying(contender):
    path.with_suffix(".trying").write_text(json.dumps({"case": "big", "contender": contender}))
"""


def run(tmp_path: Path, body: str) -> tuple[int, list[str]]:
    worker, log = tmp_path / "worker.py", tmp_path / "log"
    worker.write_text(WORKER + textwrap.dedent(body), encoding="utf-8")
    path = tmp_path / "ops.json"
    command = [sys.executable, str(worker), str(path), str(log)]
    code = supervise(command, path=path, deadline=time.monotonic() + 600, stall_s=60.0)
    assert not marker(path).exists()
    return code, log.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("code", [0, 1])
def test_a_worker_that_is_through_runs_once(code, tmp_path) -> None:
    found, runs = run(tmp_path, f"trying('one'); sys.exit({code})")
    assert found == code
    assert len(runs) == 1
    assert "--worker" in runs[0]


def test_a_contender_that_kills_the_process_is_banned(tmp_path, capfd) -> None:
    code, runs = run(tmp_path, "trying('bad')\nif not bans: os.kill(os.getpid(), 11)")
    assert code == 0
    assert len(runs) == 2
    assert '"--resume"' in runs[1]
    assert '"bad=ended the process with -11 in big"' in runs[1]
    assert "big, bad: ended the process with -11" in capfd.readouterr().out


def test_a_dead_device_is_told_as_such_and_several_may_fall(tmp_path) -> None:
    code, runs = run(tmp_path, "if len(bans) < 2: trying(f'bad {len(bans)}'); sys.exit(3)")
    assert code == 0
    assert len(runs) == 3
    assert "bad 0=took the device down in big" in runs[2]
    assert "bad 1=took the device down in big" in runs[2]


def watch(tmp_path: Path, body: str, *, stall_s: float) -> tuple[int, str]:
    """What becomes of a worker that is watched once it begins, however long it took to start."""
    path = tmp_path / "ops.json"
    command = [sys.executable, "-c", WORKER + textwrap.dedent(body), str(path), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"begins\n"
        return _watch(worker, path, stall_s)


def test_a_worker_that_hangs_is_stopped(tmp_path) -> None:
    found = watch(tmp_path, "trying('slow'); print('begins', flush=True); time.sleep(60)", stall_s=1.0)
    assert found == (-signal.SIGKILL, "no sign of life for 1 s")


def test_a_sign_of_life_keeps_a_worker_that_tries_nothing_yet(tmp_path) -> None:
    body = """
    signs = path.with_suffix(".alive")
    signs.touch()
    os.utime(signs, (time.time() + 600,) * 2)  # as one that comes again and again, on a machine of any speed
    print("begins", flush=True)
    time.sleep(3)
    """
    assert watch(tmp_path, body, stall_s=1.0) == (0, "ended the process with 0")
    assert run(tmp_path, "path.with_suffix('.alive').touch()")[0] == 0
    assert not list(tmp_path.glob("*.alive"))
    sign(tmp_path / "folder" / "ops.json")
    assert (tmp_path / "folder" / "ops.alive").exists()


def test_a_death_in_the_turns_costs_the_case(tmp_path) -> None:
    code, runs = run(tmp_path, "trying('(turns)')\nif not skips: os.abort()")
    assert code == 0
    assert '"--skip", "big"' in runs[1]


def test_a_death_that_nothing_explains_ends_the_run(tmp_path) -> None:
    code, runs = run(tmp_path, "sys.exit(9)")
    assert code == 9
    assert len(runs) == 1
