"""Two ranks of which one does what the other does not, in the loop, which is their user's: it leaves, fails, or calls more."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from grpo_fast.config import Config
from grpo_fast.train import GRPOTrainer
from grpo_fast.train.results import StepResult
from grpo_fast.types import TrainerState
from tests.train.distributed.rank_program import LETTERS, vowels

Body = Callable[[GRPOTrainer, StepResult], bool | None]


def leaves(trainer: GRPOTrainer, step: StepResult) -> bool:
    return not trainer.is_main_process and step.step == 2


def leaves_at_the_end(trainer: GRPOTrainer, step: StepResult) -> bool:
    return trainer.is_main_process and step.step == 4


def fails(trainer: GRPOTrainer, step: StepResult) -> None:
    if not trainer.is_main_process and step.step == 1:
        raise KeyError("of one rank")


def saves_alone(trainer: GRPOTrainer, step: StepResult) -> None:
    if trainer.is_main_process and step.step == 2:
        trainer.save()


def evaluates_alone(trainer: GRPOTrainer, step: StepResult) -> None:
    if not trainer.is_main_process and step.step == 4:
        trainer.evaluate()


def cannot_log(trainer: GRPOTrainer, step: StepResult) -> None:
    if trainer.is_main_process and step.step == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def cannot_warn(trainer: GRPOTrainer, step: StepResult) -> None:
    cannot_log(trainer, step)


def cannot_warn_of_evaluation(trainer: GRPOTrainer, step: StepResult) -> None:
    cannot_log(trainer, step)
    if step.step == 2:
        trainer.evaluate()


def agrees(trainer: GRPOTrainer, step: StepResult) -> None:
    if step.step == 3:
        trainer.save()
        trainer.evaluate()


def vowels_at_first(completions: list[str], trainer_state: TrainerState, **columns: object) -> list[float]:
    if trainer_state.global_step == 2:
        raise ValueError("the judge is gone")
    return vowels(completions, **columns)


WARN = (cannot_warn, cannot_warn_of_evaluation)
BODIES: dict[str, Body] = {
    body.__name__: body for body in (leaves, leaves_at_the_end, fails, saves_alone, evaluates_alone, cannot_log, *WARN, agrees)
}


def play(values: dict[str, Any], body: Body, *, again: bool = False) -> dict[str, Any]:
    """What a rank does with the loop, and what comes of it; ``again``, it then goes on with the run."""
    found: dict[str, Any] = {"steps": [], "error": None}
    begin, reward = time.monotonic(), vowels_at_first if body in WARN else vowels
    try:
        with GRPOTrainer(Config.parse(values), task=LETTERS, reward_funcs=[reward]) as trainer:
            for step in trainer.steps():
                found["steps"].append(step.step)
                if body(trainer, step):
                    break
            found["reason"], found["stopped_by"] = trainer.summary["reason"], trainer.summary["stopped_by"]
            if again:
                found["then"] = trainer.train()["step"]
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return found | {"seconds": time.monotonic() - begin}


def main(cases: Path, output: Path) -> None:
    dist.init_process_group("gloo")
    values = json.loads(cases.read_text(encoding="utf-8")) | {"reward_on_error": "none"}
    found = {
        name: play(values | {"output_dir": str(output / name)}, body, again=body is leaves) for name, body in BODIES.items()
    }
    (output / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
