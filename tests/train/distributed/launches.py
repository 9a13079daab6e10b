"""Runs of several processes: which they are, how ``torchrun`` starts them, and eyes for what they left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.system.command_line import CommandLine

ROOT = str(Path(__file__).parents[3])
TIMED = ("time/", "budget/", "step_time", "gpu_seconds", "energy_kwh", "money", "mfu", "overlap/")
RESUMED = ("whole", "adapters")
SHARING = ("rloo", "gspo")
ROUNDED = "short"  # of RESUMED's kind, with weights in bfloat16
SHORT = ("mixed", "short", "qlora")
CASES = ("whole", "rloo", "gspo", "adapters", "quantised", "ahead")
SHARDED: dict[str, dict[str, Any]] = {  # with what changes no result beside it
    "whole": {"fsdp": "full_shard"},
    "rloo": {"fsdp": "shard_grad_op", "gradient_checkpointing": True, "fsdp_parallel_head": True},
    "gspo": {"fsdp": "hybrid_shard", "offload_optimizer": True},
    "adapters": {"fsdp": "full_shard", "gradient_checkpointing": True, "offload_optimizer": True, "fsdp_parallel_head": True},
    "quantised": {"fsdp": "hybrid_shard", "fsdp_parallel_head": True},
    "ahead": {"fsdp": "full_shard"},
}

COMMON: dict[str, Any] = {
    "share_prompts": False,  # which ranks have to compute a prompt, and with it the FLOPs, depends on their number
    "prompts_per_step": 5,
    "num_generations": 4,
    "max_completion_length": 6,
    "tokens_per_microbatch": 40,
    "learning_rate": 3e-3,
    "adam_epsilon": 1e-4,  # an Adam step is a quotient: with the usual epsilon it shows the last bit of a gradient near 0
    "max_steps": 4,
    "save_steps": 100,
    "reward_workers": 0,
    "forecast": "off",
    "sinks": (),
    "report": False,
    "fsdp": "no_shard",
}
"""Settings of every run but its model and its directory."""


def search_path(directory: Path) -> str:
    """Where a process finds the package, and modules of ``directory``."""
    return os.pathsep.join([ROOT, str(directory), os.environ.get("PYTHONPATH", "")])


def torchrun(
    num_ranks: int, *arguments: str | Path, cwd: Path, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search_path(cwd), "PYTHONWARNINGS": ""}
    environment |= {"PYTHONFAULTHANDLER": "1"}  # a rank that dies in native code says where it was
    return subprocess.run(
        [*launcher, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


_LIMIT_S = 400
"""A rank that takes longer hangs: it ends, and says where it was."""
_RANKS = """
import faulthandler, importlib, sys
from pathlib import Path
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

sys.path.insert(0, {root!r})
main = importlib.import_module({program!r}).main

def rank(*arguments):
    faulthandler.enable()
    faulthandler.dump_traceback_later({limit_s}, exit=True)
    main(*arguments)

where = {{"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}}
config = LaunchConfig(1, 1, {num_ranks}, max_restarts=0, start_method="fork", run_id="ranks", **where)
elastic_launch(config, rank)(*map(Path, {arguments!r}))
"""


def forked_ranks(forks: CommandLine, num_ranks: int, program: str, *arguments: Path) -> list[dict[str, Any]]:
    """What ranks that call ``main`` of a module tell in JSON files.

    The first of its arguments is a file, beside which they run, and the last is the directory in which they tell it.

    It is torchrun's agent that starts them, in forks of a process which has imported nearly all that they need.
    """
    forks.home, directory = arguments[0].parent, arguments[-1]
    words = [*map(str, arguments)]
    code = _RANKS.format(root=ROOT, program=program, num_ranks=num_ranks, arguments=words, limit_s=_LIMIT_S)
    assert forks.run_code(code) == 0, forks.log()[-3000:]
    return [json.loads((directory / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(num_ranks)]


_PAIR = """
import faulthandler, importlib, json, os, signal, sys

sys.path.insert(0, {root!r})
os.environ.update({environment!r})
ranks = []
for rank in range(2):
    ranks.append(os.fork())
    if not ranks[-1]:
        os.environ |= {{"RANK": str(rank), "LOCAL_RANK": str(rank)}}
        log = os.open(f"rank-{{rank}}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.dump_traceback_later({limit_s}, exit=True)
        sys.exit(importlib.import_module({program!r}).main(*{arguments!r}))
codes = []
for rank in ranks:
    if os.waitid(os.P_PID, rank, os.WEXITED | os.WSTOPPED | os.WNOWAIT).si_code == os.CLD_STOPPED:
        os.kill(rank, signal.SIGKILL)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]))
with open("codes.json", "w") as file:
    json.dump(codes, file)
"""


def forked_pair(
    forks: CommandLine, directory: Path, program: str, *arguments: Any, environment: Mapping[str, str] | None = None
) -> tuple[list[int], list[str]]:
    """Two ranks that call ``main`` of a module, of which no torchrun ends the one for the other's sake.

    A rank 1 that is stopped when rank 0 has ended is killed.

    Returns:
        For each its exit code, or minus the number of the signal that ended it, and what it printed.
    """
    # the launcher keeps the store, as torchrun's does: a port that is only looked for may be another process's by then
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    forks.home = directory
    shared |= environment or {}
    code = _PAIR.format(root=ROOT, environment=shared, program=program, arguments=arguments, limit_s=_LIMIT_S)
    assert forks.run_code(code) == 0, forks.log()[-3000:]
    told = [(directory / f"rank-{rank}.log").read_text(encoding="utf-8") for rank in range(2)]
    return json.loads((directory / "codes.json").read_text(encoding="utf-8")), told


def cases(models: tuple[Path, Path], directory: Path) -> dict[str, dict[str, Any]]:
    """Runs in which every part of a step is at work, by name."""
    common = COMMON | {"model": str(models[0])}
    changes: dict[str, dict[str, Any]] = {
        "whole": {
            "num_iterations": 2,
            "refill_rounds": 1,
            "beta": 0.01,
            "sync_ref_model": True,
            "ref_model_sync_steps": 2,
            "entropy_coef": 0.05,
            "weight_decay": 0.01,
            "eval_steps": 2,
            "eval_size": 5,
            "forecast": "warn",
            "baseline_probe": 5,
            "max_steps": 6,
        },
        "rloo": {"loss_type": "rloo", "beta": 0.02, "keep_dead_rows_for_metrics": True},
        "gspo": {
            "loss_type": "gspo",
            "scale_rewards": "batch",
            "mask_truncated_completions": True,
            "top_k": 20,
            "top_entropy_quantile": 0.5,
            "entropy_coef": 0.01,
        },
        "adapters": {"use_peft": True, "lora_r": 4, "beta": 0.02, "learning_rate": 1e-2, "max_steps": 6},
        "quantised": {"use_peft": True, "lora_r": 4, "load_in_4bit": True, "use_bnb_nested_quant": True},
        "ahead": {
            "max_staleness": 2,
            "refill_rounds": 1,
            "eval_steps": 2,
            "eval_size": 5,
            "baseline_probe": 5,
            "forecast": "warn",
        },
        "mixed": {"dtype": "bfloat16", "fsdp": "full_shard", "max_steps": 2},
        "failing": {},
        "unrewarded": {"max_steps": 2},
    }
    changes |= {name: changes[name] | {"share_prompts": True} for name in SHARING}
    changes["quantised"] |= {"model": str(models[1]), "learning_rate": 1e-2}
    changes["short"] = changes["mixed"] | {"weights_dtype": "bfloat16"}
    changes["qlora"] = changes["mixed"] | changes["quantised"]  # bytes, bfloat16 and float32 in one layer
    changes |= {f"{more['fsdp']} {name}": changes[name] | more for name, more in SHARDED.items()}
    changes |= {f"{half} {name}": changes[f"full_shard {name}"] for half in ("begun", "resumed") for name in RESUMED}
    changes |= {f"{half} {ROUNDED}": changes[ROUNDED] | {"max_steps": 6} for half in ("begun", "resumed")}
    return {name: common | change | {"output_dir": str(directory / name)} for name, change in changes.items()}


def trace(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(TIMED)} for row in rows]


def without(rows: list[dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith(names)} for row in rows] if names else rows


def uncounted(case: str) -> tuple[str, ...]:
    """What gradient checkpointing changes beside memory, and sharing prompts among other ranks."""
    return ("flops",) if case in SHARING or SHARDED[case].get("gradient_checkpointing") else ()


class Launch:
    """What the ranks of one launch found, and the runs that they left."""

    def __init__(
        self, num_ranks: int, models: tuple[Path, Path], directory: Path, *, leave_out: str, forks: CommandLine
    ) -> None:
        self.directory = directory
        file = directory / "cases.json"
        wanted = {name: values for name, values in cases(models, directory).items() if not name.startswith(leave_out)}
        file.write_text(json.dumps(wanted), encoding="utf-8")
        self.found = forked_ranks(forks, num_ranks, "tests.train.distributed.rank_program", file, directory)


def random_model(kind: str, sizes: Mapping[str, Any]) -> Any:
    """A model of random weights, the same each time; sizes that are ``None`` are the architecture's own."""
    torch.manual_seed(5)
    given = {name: value for name, value in sizes.items() if value is not None}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given))
