from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_fast.config import Config
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.distributed import ALONE, World, _packed, is_restart, note_launch

PROGRAM = Path(__file__).with_name("rank_program.py")
TIMED = ("time/", "budget/", "step_time", "gpu_seconds", "energy_kwh", "money", "mfu")
DEADLINE_S = 60.0
RESUMED = ("whole", "adapters")
SHARING = ("rloo", "gspo")
ROUNDED = "short"  # of RESUMED's kind, with weights in bfloat16
SHORT = ("mixed", "short", "qlora")
CASES = ("whole", "rloo", "gspo", "adapters", "quantised")
SHARDED: dict[str, dict[str, Any]] = {  # with what changes no result beside it
    "whole": {"fsdp": "full_shard"},
    "rloo": {"fsdp": "shard_grad_op", "gradient_checkpointing": True, "fsdp_parallel_head": True},
    "gspo": {"fsdp": "hybrid_shard", "offload_optimizer": True},
    "adapters": {"fsdp": "full_shard", "gradient_checkpointing": True, "offload_optimizer": True, "fsdp_parallel_head": True},
    "quantised": {"fsdp": "hybrid_shard", "fsdp_parallel_head": True},
}


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """The program of the ranks, for what one process makes of the same cases."""
    spec = importlib.util.spec_from_file_location("rank_program", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torchrun(
    num_ranks: int, *arguments: str | Path, cwd: Path, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), *options]
    found = [str(Path(__file__).parents[2]), str(cwd), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(found), "PYTHONWARNINGS": ""}
    return subprocess.run(
        [*launcher, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def cases(models: tuple[Path, Path], directory: Path) -> dict[str, dict[str, Any]]:
    """Runs in which every part of a step is at work, by name."""
    common = {
        "share_prompts": False,  # which ranks have to compute a prompt, and with it the FLOPs, depends on their number
        "model": str(models[0]),
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
    changes: dict[str, dict[str, Any]] = {
        "whole": {
            "num_iterations": 2,
            "refill_rounds": 1,
            "beta": 0.01,
            "weight_decay": 0.01,
            "eval_steps": 2,
            "eval_size": 5,
            "forecast": "warn",
            "baseline_probe": 5,
            "max_steps": 6,
        },
        "rloo": {"loss_type": "rloo", "beta": 0.02, "keep_dead_rows_for_metrics": True},
        "gspo": {"loss_type": "gspo", "scale_rewards": "batch", "mask_truncated_completions": True, "top_k": 20},
        "adapters": {"use_peft": True, "lora_r": 4, "beta": 0.02, "learning_rate": 1e-2, "max_steps": 6},
        "quantised": {"use_peft": True, "lora_r": 4, "load_in_4bit": True, "use_bnb_nested_quant": True},
        "mixed": {"dtype": "bfloat16", "fsdp": "full_shard", "max_steps": 2},
        "failing": {},
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

    def __init__(self, num_ranks: int, models: tuple[Path, Path], directory: Path, *, leave_out: str) -> None:
        self.directory = directory
        file = directory / "cases.json"
        wanted = {name: values for name, values in cases(models, directory).items() if not name.startswith(leave_out)}
        file.write_text(json.dumps(wanted), encoding="utf-8")
        done = torchrun(num_ranks, PROGRAM, file, directory, cwd=directory)
        assert done.returncode == 0, done.stderr
        self.found = [json.loads((directory / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(num_ranks)]


@pytest.fixture(scope="module")
def models(tiny_model: Path, wide_model: Path) -> tuple[Path, Path]:
    return tiny_model, wide_model


@pytest.fixture(scope="module")
def launches(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Launch]:
    """Two ranks; then four, which also go on with a sharded run that the two began."""
    two, four = (tmp_path_factory.mktemp(f"ranks-{count}") for count in (2, 4))
    first = Launch(2, models, two, leave_out="resumed")
    for name in (*RESUMED, ROUNDED):
        shutil.copytree(two / f"begun {name}", four / f"resumed {name}")
    return {2: first, 4: Launch(4, models, four, leave_out="begun")}


@pytest.fixture(params=[2, 4])
def launch(request: pytest.FixtureRequest, launches: dict[int, Launch]) -> Launch:
    return launches[request.param]


@pytest.fixture(scope="module")
def alone(program: ModuleType, models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same runs in one process."""
    directory = tmp_path_factory.mktemp("alone")
    made = cases(models, directory)
    return {name: program.play(made[name]) | {"trace": trace(directory / name)} for name in (*CASES, *SHORT)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *(f"{more['fsdp']} {case}" for case, more in SHARDED.items())])
def test_any_number_of_ranks_makes_the_run_of_one_process(name: str, launch: Launch, alone: dict[str, Any]) -> None:
    case = name.rsplit(maxsplit=1)[-1]
    expected = alone[case]
    found = trace(launch.directory / name)
    assert [row["step"] for row in found] == [row["step"] for row in expected["trace"]]
    # completions that are the same have a KL that differs by its rounding: an advantage of 0 then, or one of 1e-9
    unsure = ("flops", "tokens/trained", "tokens/dropped") if case == "rloo" else uncounted(case)
    for row, true in zip(without(found, unsure), without(expected["trace"], unsure), strict=True):
        assert row == pytest.approx(true, rel=1e-5, abs=1e-6, nan_ok=True)
        assert row.get("reward") == true.get("reward"), "other completions were sampled"
        assert row.get("num_tokens") == true.get("num_tokens")
    for rank, findings in enumerate(launch.found):
        told = findings[name]
        assert told["error"] is None
        error = torch.tensor(told["weights"]) - torch.tensor(expected["weights"])
        assert error.abs().max() < 1e-6
        assert told["weights"] == launch.found[0][name]["weights"], "ranks hold different weights"
        assert told["is_main_process"] == (rank == 0)
        assert [step for step, *_ in told["steps"]] == [step for step, *_ in expected["steps"]]
        parts = {case: 1, f"hybrid_shard {case}": 2}.get(name, len(launch.found))
        assert told["numbers held"] == pytest.approx(len(expected["weights"]) / parts, rel=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("name", RESUMED)
def test_a_sharded_checkpoint_is_gone_on_with_by_any_number_of_ranks(
    name: str,
    launches: dict[int, Launch],
    alone: dict[str, Any],
    program: ModuleType,
    models: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    halfway = launches[4].directory / f"resumed {name}"
    begun, resumed = (launches[count].found[0][f"{half} {name}"] for count, half in ((2, "begun"), (4, "resumed")))
    assert ([step for step, *_ in begun["steps"]], [step for step, *_ in resumed["steps"]]) == ([1, 2], [3, 4])
    assert {path.name for path in (halfway / "checkpoint-4/optimizer").iterdir()} >= {"__0_0.distcp", "__3_0.distcp"}
    if name == "adapters":
        base = AutoModelForCausalLM.from_pretrained(models[0])
        model: Any = peft.PeftModel.from_pretrained(base, halfway / "checkpoint-4").base_model.model
        assert not (halfway / "checkpoint-4/model.safetensors").exists()
    else:
        model = AutoModelForCausalLM.from_pretrained(halfway / "checkpoint-4")
    assert torch.cat([p.detach().flatten() for p in model.parameters()]).tolist() == resumed["weights"]

    shutil.copytree(halfway, tmp_path / f"resumed {name}")
    last = program.play(cases(models, tmp_path)[f"resumed {name}"], resume=True)
    assert [step for step, *_ in last["steps"]] == [5, 6]
    assert (torch.tensor(last["weights"]) - torch.tensor(alone[name]["weights"])).abs().max() < 1e-6
    traces = (without(rows, uncounted(name)) for rows in (trace(tmp_path / f"resumed {name}"), alone[name]["trace"]))
    for row, true in zip(*traces, strict=True):
        assert row == pytest.approx(true, rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.slow
def test_bfloat16_weights_and_moments_come_back_bit_by_bit_to_any_number_of_ranks(
    launches: dict[int, Launch], program: ModuleType, models: tuple[Path, Path], tmp_path: Path
) -> None:
    saved = {half: launches[count].found for count, half in ((2, "begun"), (4, "resumed"))}
    begun, resumed = ([rank[f"{half} {ROUNDED}"] for rank in saved[half]] for half in ("begun", "resumed"))
    assert [rank["error"] for rank in begun + resumed] == [None] * 6
    assert [step for step, *_ in begun[0]["steps"] + resumed[0]["steps"]] == [1, 2, 3, 4]
    kinds = {(name.rsplit(maxsplit=1)[-1], found.split()[0]) for name, found in begun[0]["at last"].items()}
    assert {("weight", "torch.bfloat16"), ("exp_avg", "torch.float32"), ("exp_avg_sq", "torch.float32")} <= kinds
    assert begun[0]["at first"] != begun[0]["at last"], "nothing was trained"
    for rank in resumed:
        assert rank["at first"] == begun[0]["at last"]
        assert rank["at last"] == resumed[0]["at last"] != begun[0]["at last"]
    for count, half, steps in ((2, "begun", [3, 4]), (4, "resumed", [5, 6])):
        shutil.copytree(launches[count].directory / f"{half} {ROUNDED}", tmp_path / f"{half} {ROUNDED}")
        values = cases(models, tmp_path)[f"{half} {ROUNDED}"]
        alone = program.play(values, resume=True, until=steps[-1])
        assert [step for step, *_ in alone["steps"]] == steps
        assert alone["at first"] == saved[half][0][f"{half} {ROUNDED}"]["at last"]


@pytest.mark.slow
def test_the_runs_are_telling(alone: dict[str, Any]) -> None:
    rows = alone["whole"]["trace"][1:]
    assert len({row["loss"] for row in rows}) == len(rows)
    assert any(row["clip_ratio/region_mean"] > 0 for row in rows)
    assert any(0 < row["frac_reward_zero_std"] < 1 for row in [*rows, *alone["gspo"]["trace"]]), "some groups are left out"


@pytest.mark.slow
def test_a_reward_that_fails_on_one_rank_ends_all_with_a_checkpoint(launch: Launch) -> None:
    for told in launch.found:
        assert told["failing"]["error"] == launch.found[0]["failing"]["error"]
        assert told["failing"]["error"].startswith("RewardError: reward function 'failing' ")
        assert "no such answer" in told["failing"]["error"]
    assert (launch.directory / "failing" / "checkpoint-0" / "state.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_in_bfloat16_ranks_make_the_first_step_of_one_process_to_its_rounding(
    name: str, launch: Launch, alone: dict[str, Any]
) -> None:
    [first, true] = (rows[0] for rows in (trace(launch.directory / name), alone[name]["trace"]))
    assert first["step"] == true["step"] == 1
    assert first["reward"] == true["reward"]
    assert first["loss"] == pytest.approx(true["loss"], abs=1e-2)
    assert first["grad_norm"] == pytest.approx(true["grad_norm"], rel=5e-2)
    for told in launch.found:
        assert told[name]["error"] is None
        assert told[name]["weights"] == launch.found[0][name]["weights"], "ranks hold different weights"
    weights = torch.tensor(launch.found[0][name]["weights"])
    assert torch.equal(weights.bfloat16().float(), weights) == (name == "short")


@pytest.mark.slow
def test_optimizers_do_to_shards_what_they_do_to_whole_weights(launch: Launch) -> None:
    for told in launch.found:
        assert told["optimizers"]["stochastic"] == 0.0
        assert told["optimizers"]["offloaded"] < 1e-6
        assert (told["optimizers"]["stochastic tensors"], told["optimizers"]["offloaded tensors"]) == (9, 12)


@pytest.mark.slow
def test_a_head_is_gathered_once_an_iteration_or_never(launch: Launch) -> None:
    for told in launch.found:
        assert told["traffic"]["False"] == [2, 2], "gathers and reduce-scatters of its size in two iterations"
        assert told["traffic"]["True"] == [0, 0]
        assert min(told["traffic"]["False others"], told["traffic"]["True others"]) > 20, "several micro-batches, by layer"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "adapters", "quantised"])
def test_an_engine_reads_shards_a_layer_at_a_time_and_no_rank_hangs_where_it_fails(name: str, launch: Launch) -> None:
    for rank, findings in enumerate(launch.found):
        told = findings["streamed"][name]
        assert told["synced"] == told["again"] == told["after"] == "1.0"
        assert told["arrived"] == (told["names"] if rank == 0 else []), "in order, bit for bit in the engine's type"
        assert 0 < told["most"] <= told["largest unit"], "bytes of whole weights that live at once"
        assert told["left"] == 0
        assert "phase 'send': the wire broke; 2 attempts were made" in told["broken"]
        assert told["saved"]
        if name == "whole":
            assert "the weight sync hung in its phase 'send'" in told["hung"]
            assert "the other ranks do not gather any more" in told["refusal"]


@pytest.mark.slow
def test_what_ranks_tell_each_other(launch: Launch) -> None:
    size = len(launch.found)
    told = [found["exchanges"] for found in launch.found]
    assert all(one["gathered"] == [f"rank {rank}" for rank in range(size)] for one in told)
    assert [one["once"] for one in told] == [True] + [False] * (size - 1)
    for number, count in enumerate((0, 1, 7)):
        edges = [one["shares"][number] for one in told]
        assert [first for first, _ in edges] == [0, *(last for _, last in edges[:-1])]
        assert edges[-1][1] == count
        assert max(last - first for first, last in edges) - min(last - first for first, last in edges) <= 1
    for one in told:
        assert one["summed"][0] == [[sum(range(1, size + 1))] * 2] * 3
        assert one["summed"][1:] == [[size, size], [[0, 2 * size], [size, 3 * size]], [{2: 256, 4: 260}[size]]]
        assert one["gather raised"] == ["rank 1 stumbled", "it must"]
        assert "once raised" not in one, "rank 0 does not stumble"


@pytest.mark.slow
def test_a_head_in_parts_gives_loss_and_gradients_of_the_whole_one(launch: Launch) -> None:
    for told in launch.found:
        *errors, smallest = told["head"]
        assert max(errors) < 1e-12
        assert smallest > 1e-4
        assert max(told["gathered rows"]) < 1e-12


KILLER = """
import os, signal, time
from pathlib import Path

CALLS = []
Path(f"started-{os.environ['RANK']}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 'alone')}").touch()


def vowels(completions, **columns):
    CALLS.append(1)
    if len(CALLS) == 5 and os.environ["RANK"] == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        Path("killed").touch()
        os.kill(os.getpid(), getattr(signal, os.environ.get("FATAL_SIGNAL", "SIGKILL")))
    return [sum(letter in "aei" for letter in text) / max(1, len(text)) for text in completions]
"""


@pytest.fixture
def fatal(tiny_model: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Makes the arguments of a run in which rank 1 is killed in its fifth step."""

    def make(**changes: Any) -> list[str]:
        (tmp_path / "killer.py").write_text(KILLER, encoding="utf-8")
        rows = [{"prompt": f"{a}{b}=", "answer": a} for a in "abcdefgh" for b in "abcd"]
        (tmp_path / "letters.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        settings = {
            "model": tiny_model,
            "dataset": "letters.jsonl",
            "reward_funcs": "killer:vowels",
            "reward_workers": 0,
            "prompts_per_step": 4,
            "num_generations": 4,
            "max_completion_length": 6,
            "learning_rate": 3e-3,
            "adam_epsilon": 1e-4,
            "max_steps": 7,
            "save_steps": 3,
            "forecast": "warn",
            "baseline_probe": 0,
            "output_dir": "run",
        } | changes
        flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        return ["train", *flags, "--sinks", "console", "--no-report", "--no-share-prompts"]

    return make


def program_path() -> str:
    found = shutil.which("grpo-fast", path=Path(sys.executable).parent)
    assert found is not None
    return found


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_was_killed(
    fatal: Callable[..., list[str]], program: ModuleType, tmp_path: Path
) -> None:
    done = torchrun(2, program_path(), *fatal(), cwd=tmp_path, options=("--no-python", "--max-restarts", "1"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "started-1-1").stat().st_mtime - (tmp_path / "killed").stat().st_mtime < DEADLINE_S
    rows = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["step"], row["event"]) for row in rows if row["event"] in {"start", "resume"}] == [(0, "start"), (3, "resume")]
    settings = tomllib.loads((tmp_path / "run/config.toml").read_text(encoding="utf-8"))
    changes = {"output_dir": tmp_path / "straight", "dataset": str(tmp_path / "letters.jsonl")}
    with GRPOTrainer(Config.parse(settings | changes), reward_funcs=[program.vowels]) as trainer:
        trainer.train()
    for row, true in zip(trace(tmp_path / "run"), trace(tmp_path / "straight"), strict=True):
        assert row == pytest.approx(true, rel=1e-5, abs=1e-6, nan_ok=True)
    assert json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))["stopped_by"] == "max_steps"


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_dies_or_hangs_ends_the_others_in_time(fate: str, fatal: Callable[..., list[str]], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared["FATAL_SIGNAL"] = fate
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [program_path(), *fatal(ddp_timeout_s=1800 if fate == "SIGKILL" else 20)]
    ranks = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | shared | {"PYTHONPATH": path, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, told = ranks[0].communicate(timeout=180)
        ended = time.time()
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ended - (tmp_path / "killed").stat().st_mtime < DEADLINE_S
    assert [rank.returncode for rank in ranks] == [1, -9]
    assert "rank 0 of 2 lost another one" in " ".join(told.split())
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]


def test_an_error_of_the_system_arrives_whole() -> None:
    failure = _packed(OSError(errno.ENOSPC, "No space left on device", "file"))
    assert failure is not None
    copy = failure.rebuild()
    assert isinstance(copy, OSError)
    assert (copy.errno, copy.filename) == (errno.ENOSPC, None)  # a file's name is not among the arguments
    assert "No space left" in str(copy)


def test_alone_there_is_nothing_to_exchange() -> None:
    values = [torch.ones(2)]
    ALONE.sum(values)
    assert values[0].tolist() == [1.0, 1.0]
    assert ALONE.gather(lambda: 7) == [7]
    assert ALONE.once(lambda: "x") == "x"
    assert ALONE.share(5) == slice(0, 5)
    assert ALONE.is_main
    with pytest.raises(RuntimeError, match="somebody"), ALONE.watched():
        raise RuntimeError("gloo is somebody else's here")


def test_a_process_that_nobody_launched_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert World.join(torch.device("cpu"), timeout_s=1.0).size == 1
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert World.join(torch.device("cpu"), timeout_s=1.0).size == 1


def test_a_restart_goes_on_with_its_own_launch_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    note_launch(tmp_path)
    assert not list(tmp_path.iterdir()), "nobody launched it"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    note_launch(tmp_path)
    assert not is_restart(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert is_restart(tmp_path)
    assert not is_restart(tmp_path / "elsewhere")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 2")
    assert not is_restart(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    note_launch(tmp_path)
    assert is_restart(tmp_path)
