"""``grpo-fast`` again and again, each time in a process of its own that can be killed, though torch is imported only once.

What draws a report, reads tables and evaluates a model is imported once, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

_FORKS = """
import atexit, gc, json, os, sys, types, warnings
atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))  # last of all: Triton's bindings call the frozen a leak
gc.disable()
import grpo_fast.report.html, grpo_fast.tasks.files, grpo_fast.train.evaluate_model
from grpo_fast.cli import main
from grpo_fast.tasks.load import load_task
from grpo_fast.train import GRPOTrainer

def run_code(code):
    sys.path.insert(0, "")
    warnings.filterwarnings("error", category=DeprecationWarning, module="__main__")
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), vars(module))

sys.path.remove("")  # the installed command has no such entry
gc.freeze()  # else each fork looks through all of it as it ends, and copies the pages
gc.enable()
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        home, words = json.loads(line)
        os.chdir(home)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.exit(run_code(words) if isinstance(words, str) else main(words))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
_MARK = "GRPO_FAST_FORKS"


class CommandLine:
    """A process that forks one ``grpo-fast`` after another.

    Args:
        home: where the commands run, and where ``log.txt`` takes what they print; modules in it can be imported. It may be
            another one for each command.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._mark = uuid.uuid4().hex
        environment = os.environ | {"OMP_NUM_THREADS": "1", _MARK: self._mark}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _FORKS], cwd=home, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._read() == "ready"

    def run(
        self,
        *arguments: str,
        until: Callable[[], bool] | None = None,
        signals: Sequence[signal.Signals] = (signal.SIGKILL,),
        deadline_s: float = 60.0,
    ) -> int:
        """Runs one command.

        Args:
            *arguments: the command without the program's name.
            until: the moment at which to send ``signals``; looked at until the command or ``deadline_s`` has ended.
            signals: sent then, in order.
            deadline_s: seconds to wait for the moment.

        Returns:
            The exit code, or minus the number of the signal that ended the command.
        """
        child = self._start(arguments)
        begun = time.monotonic()
        while until is not None and not until():
            time.sleep(0.0005)
            if time.monotonic() > begun + deadline_s or not Path(f"/proc/{child}/fd/1").exists():
                break
        with contextlib.suppress(ProcessLookupError):  # the command has ended before the moment came
            for number in signals if until is not None else ():
                os.kill(child, number)
        return int(self._read())

    def run_code(self, code: str) -> int:
        """Runs Python code, as ``python -c`` does, and gives the exit code; a deprecated name in it is an error."""
        self._start(code)
        return int(self._read())

    def left_over(self) -> list[int]:
        """Processes that the commands started and that still live."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                inherited = f"{_MARK}={self._mark}".encode() in (process / "environ").read_bytes()
            except OSError:  # it has ended, or is another user's
                continue
            if inherited and int(process.name) != self._process.pid:
                found.append(int(process.name))
        return found

    def log(self) -> str:
        """What the commands have printed."""
        return (self.home / "log.txt").read_text(encoding="utf-8")

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _start(self, words: Sequence[str] | str) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(self.home), words]) + "\n")
        self._process.stdin.flush()
        return int(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()
