"""Two ranks that are started differently, in one way after the other; each tells what came of it in a JSON file."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from safetensors.torch import load_file, save_file

from grpo_fast.config import Config, ConfigError
from grpo_fast.rollout import RolloutError
from grpo_fast.tasks.task import Task
from grpo_fast.train import engines
from grpo_fast.train.distributed import World
from grpo_fast.train.handshake import check_directory
from tests.train.distributed.rank_program import play
from tests.train.trainer.runs import ROWS


def unwritable(config: Config, world: World) -> str:
    """What is told where rank 1 sees the directory and can make no file in it: it has no number left for one."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if world.rank == 1:
        free = os.open("/dev/null", os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        check_directory(config, world)
    except ConfigError as error:
        return f"ConfigError: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    return ""


def own_model(directory: Path, model: Path, *, is_changed: bool) -> Path:
    """A directory with a copy of the model, of which one weight may be another."""
    shutil.copytree(model, directory / "model")
    file = directory / "model" / "model.safetensors"
    weights = load_file(file)
    if is_changed:
        next(weights[name] for name in weights if "down_proj" in name).mul_(1.001)
    save_file(weights, file, metadata={"format": "pt"})
    return directory


def main(settings: Path, output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    common = json.loads(settings.read_text(encoding="utf-8"))

    def tried(*values: dict[str, Any], name: str = "run", **given: Any) -> str | None:
        return play(common | {"output_dir": str(output / name)} | values[rank], **given)["error"]

    found: dict[str, Any] = {}
    found["settings"] = tried({"learning_rate": 1e-3, "seed": 7}, {"learning_rate": 1e-5, "seed": 8})
    found["generations"] = tried({"num_generations": 4}, {"num_generations": 2})
    found["shards"] = tried({"fsdp": "full_shard"}, {"fsdp": "no_shard"})
    found["resume"] = tried({}, {}, resume=rank == 1)
    (output / "apart 0").mkdir(exist_ok=True)
    (output / "apart 1").mkdir(exist_ok=True)
    found["directories"] = tried({"output_dir": str(output / "apart 0")}, {"output_dir": str(output / "apart 1")})
    found["new directories"] = tried({"output_dir": str(output / "new 0")}, {"output_dir": str(output / "new 1")})
    sharded = Config.parse(common | {"output_dir": str(output / "run"), "fsdp": "full_shard"})
    found["unwritable"] = unwritable(sharded, World.join(torch.device("cpu"), timeout_s=60))
    rows = [ROWS[:24], ROWS[1:25]][rank]
    found["prompts"] = tried({}, {}, task=Task("letters", rows, ROWS[24:], ("exact_match",), "exact_match"))
    bad = [ROWS[:24], [{"answer": "a"}]][rank]
    found["one rank's data"] = tried({}, {}, task=Task("letters", bad, ROWS[24:], ("exact_match",), "exact_match"))
    servers = {"rollout": "vllm-http", "vllm_server_urls": ["http://127.0.0.1:8000"]}
    asked: list[str] = []

    def ask(urls: Sequence[str], **settings: Any) -> None:
        asked.extend(urls)
        raise RolloutError("nobody answers")

    engines.require_vllm, engines.wait_until_up = (lambda: Version("1")), ask  # type: ignore[assignment]
    found["servers"], found["asked"] = tried(servers, servers), asked
    hybrid = {"fsdp": "hybrid_shard"}
    for name, counts in {"uneven nodes": ["1", "2"], "untold nodes": ["", ""]}.items():
        os.environ.pop("LOCAL_WORLD_SIZE", None)
        if counts[rank]:
            os.environ["LOCAL_WORLD_SIZE"] = counts[rank]
        found[name] = tried(hybrid, hybrid)
    os.chdir(own_model(output.parent / f"rank {rank}", Path(common["model"]), is_changed=rank == 1))
    here = {"model": "/proc/self/cwd/model"}  # one path that leads to another model on each rank, as on two nodes
    found["weights"] = tried(here, here)
    shards = here | {"fsdp": "full_shard"}
    found["sharded weights"] = tried(shards, shards)
    found["left"] = sorted(path.name for path in output.iterdir() if not path.name.startswith("rank-"))
    found["alike"] = tried({"prompts_per_step": 1}, {"prompts_per_step": 1}, name="alike")
    os.chdir([output, output / "apart 0"][rank])
    longer = {"prompts_per_step": 1, "max_steps": 2}
    paths = [{"output_dir": "alike"}, {"output_dir": "../alike"}]
    found["other path"] = tried(*(longer | path for path in paths), resume=True)
    (output / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
