"""Each trainer's steps of a case, timed by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.system.arguments import checkpointing
from benchmarks.system.device_cases import StepCase
from grpo_fast import Config, GRPOTrainer
from grpo_fast.rollout.engine import SamplingParams
from grpo_fast.tasks import Task
from grpo_fast.train.plan_memory import MemoryInputs, MemoryPlanner, device_room
from grpo_fast.types import Completion

LORA_R, LORA_ALPHA = 16, 32
_NUM_PROMPTS = 64


def spread_rewards(completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """A reward that hardly ever is the same for two completions, so that no group is left out."""
    return [sum((place + 1) * token for place, token in enumerate(ids)) % 997 / 997 for ids in completion_ids]


def given_tokens(count: int, length: int, *, limit: int, seed: int) -> list[list[int]]:
    """Random tokens, the same for every trainer."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[list[int]] = torch.randint(3, limit, (count, length), generator=generator).tolist()
    return drawn


class GivenCompletions:
    """A rollout engine that takes no time; implements :class:`~grpo_fast.rollout.engine.RolloutEngine`."""

    def __init__(self, case: StepCase, limit: int) -> None:
        self._case = case
        self._limit = limit
        self._version = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        num_generations: int,
        seed: int,
        first_prompt: int = 0,
    ) -> list[list[Completion]]:
        """Completions of random tokens."""
        del sampling, first_prompt
        length = self._case.completion_tokens
        drawn = given_tokens(len(prompts) * num_generations, length, limit=self._limit, seed=seed)
        made = [Completion(tuple(ids), (-1.0,) * length, "length", "", weight_version=self._version) for ids in drawn]
        return [made[first : first + num_generations] for first in range(0, len(made), num_generations)]

    def sync_weights(self, policy: torch.nn.Module, version: int) -> dict[str, float]:
        """Needs none."""
        del policy
        self._version = version
        return {}

    def sleep(self) -> None:
        """Has nothing to free."""

    def close(self) -> None:
        """Holds nothing."""


def configuration(case: StepCase, directory: Path, run: Path) -> Config:
    """A case as this project's configuration."""
    length = case.prompt_tokens + case.completion_tokens
    return Config.parse(
        {
            "model": str(directory),
            "output_dir": run,
            "prompts_per_step": case.prompts,
            "num_generations": case.generations,
            "max_completion_length": case.completion_tokens,
            "tokens_per_microbatch": case.sequences_per_microbatch * length,
            "gradient_checkpointing": case.checkpointing,
            "use_peft": case.weights != "full",
            "load_in_4bit": case.weights == "qlora",
            "use_bnb_nested_quant": case.weights == "qlora",
            "learning_rate": 1e-6,
            "max_steps": 1000,
            "save_steps": 1000,
            "baseline_probe": 0,
            "reward_workers": 0,
            "forecast": "off",
            "collapse_action": "off",
            "report": False,
            "sinks": (),
        }
    )


def planned_gib(case: StepCase, directory: Path) -> float:
    """What the memory plan says that a case allocates at most, before anything is loaded."""
    config = configuration(case, directory, directory)
    room, kind = device_room(config, None)
    inputs = MemoryInputs(room, kind, prompt_tokens=case.prompt_tokens, num_devices=1)
    plan = MemoryPlanner(AutoConfig.from_pretrained(directory), config, inputs).plan()
    fullest = max(sum(phase.values()) for name, phase in plan.phases.items() if case.samples or name != "sampling")
    libraries = plan.lasting["process and libraries"]  # torch does not count them as allocated
    return (sum(plan.lasting.values()) - libraries + fullest) / 2**30


def grpo_fast_steps(case: StepCase, directory: Path, folder: Path) -> list[dict[str, float]]:
    """This project's."""
    config = configuration(case, directory, folder / "run")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    task = Task("given", _prompts(case, tokenizer), [], ("exact_match",), "exact_match")
    engine = {} if case.samples else {"engine": GivenCompletions(case, len(tokenizer))}
    trainer = GRPOTrainer(config, task=task, reward_funcs=[spread_rewards], **engine)  # type: ignore[arg-type]
    found, steps = [], trainer.steps()
    for _ in range(case.num_steps):
        begun = time.perf_counter()
        metrics = next(steps).metrics
        _wait()
        phases = {name: metrics.get(f"time/{name}", 0.0) for name in ("rollout", "reward", "score", "train", "sync")}
        found.append({"step_s": time.perf_counter() - begun, **{f"{name}_s": value for name, value in phases.items()}})
    return found


class _Steps(TrainerCallback):
    """Times TRL's steps, and what comes before the training in each."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []
        self.collected_s = 0.0
        self._begun = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        _wait()
        self.collected_s, self._begun = 0.0, time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        _wait()
        whole = time.perf_counter() - self._begun
        self.found.append({"step_s": whole, "collect_s": self.collected_s, "train_s": whole - self.collected_s})


def trl_steps(case: StepCase, directory: Path, folder: Path) -> list[dict[str, float]]:
    """TRL's, with its own defaults where the case says nothing."""
    return _trl_steps(case, directory, folder, _transformers_model)


def unsloth_steps(case: StepCase, directory: Path, folder: Path) -> list[dict[str, float]]:
    """Unsloth's: it patches TRL's trainer, and brings its own model."""
    return _trl_steps(case, directory, folder, _unsloth_model)


STEPPERS: dict[str, Callable[[StepCase, Path, Path], list[dict[str, float]]]] = {
    "grpo_fast": grpo_fast_steps,
    "trl": trl_steps,
    "unsloth": unsloth_steps,
}


def _trl_steps(
    case: StepCase, directory: Path, folder: Path, load: Callable[[StepCase, Path], tuple[Any, Any]]
) -> list[dict[str, float]]:
    model, peft_config = load(case, directory)  # before TRL is imported: Unsloth patches it
    from trl import GRPOConfig  # noqa: PLC0415 (as above)
    from trl import GRPOTrainer as TRLTrainer  # noqa: PLC0415

    steps = _Steps()

    class Timed(TRLTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            begun = time.perf_counter()
            made = super()._generate_and_score_completions(inputs)
            _wait()
            steps.collected_s += time.perf_counter() - begun
            return made

    tokenizer = AutoTokenizer.from_pretrained(directory)
    cuda = torch.cuda.is_available()
    count = case.prompts * case.generations
    arguments = GRPOConfig(
        output_dir=str(folder),
        use_cpu=not cuda,
        bf16=cuda,
        **checkpointing(on=case.checkpointing),
        per_device_train_batch_size=case.sequences_per_microbatch,
        gradient_accumulation_steps=count // case.sequences_per_microbatch,
        num_generations=case.generations,
        max_completion_length=case.completion_tokens,
        learning_rate=1e-6,
        max_steps=case.num_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )

    def given(prompts: list[str], trainer: Any) -> dict[str, Any]:
        drawn = given_tokens(len(prompts), case.completion_tokens, limit=len(tokenizer), seed=trainer.state.global_step)
        ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": drawn, "logprobs": None}

    trainer = Timed(
        model=model,
        processing_class=tokenizer,
        reward_funcs=spread_rewards,
        args=arguments,
        train_dataset=Dataset.from_list(_prompts(case, tokenizer)),
        peft_config=peft_config,
        callbacks=[steps],
        rollout_func=None if case.samples else given,
    )
    trainer.train()
    return steps.found


def _transformers_model(case: StepCase, directory: Path) -> tuple[Any, Any]:
    """Weights that are trained in float32 under bfloat16 autocast, frozen ones in bfloat16 or four bits: as ours."""
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda and case.weights != "full" else torch.float32
    arguments: dict[str, Any] = {"device_map": {"": 0}} if cuda else {}
    if case.weights == "qlora":
        from transformers import BitsAndBytesConfig  # noqa: PLC0415 (bitsandbytes may be missing)

        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        arguments["device_map"] = {"": 0 if cuda else "cpu"}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **arguments)
    if case.weights == "full":
        return model, None
    from peft import LoraConfig  # noqa: PLC0415 (as above)

    return model, LoraConfig(r=LORA_R, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def _unsloth_model(case: StepCase, directory: Path) -> tuple[Any, Any]:
    from unsloth import FastLanguageModel  # noqa: PLC0415 (only where it is installed)

    model, _ = FastLanguageModel.from_pretrained(
        str(directory),
        max_seq_length=case.prompt_tokens + case.completion_tokens,
        load_in_4bit=case.weights == "qlora",
        full_finetuning=case.weights == "full",
    )
    if case.weights != "full":
        model = FastLanguageModel.get_peft_model(
            model,
            r=LORA_R,
            lora_alpha=LORA_ALPHA,
            use_gradient_checkpointing="unsloth" if case.checkpointing else False,
        )
    return model, None


def _prompts(case: StepCase, tokenizer: Any) -> list[dict[str, Any]]:
    """Prompts of exactly so many tokens where the tokeniser gives a token back as itself, of about so many elsewhere."""
    drawn = given_tokens(_NUM_PROMPTS, case.prompt_tokens, limit=len(tokenizer), seed=1)
    return [{"prompt": tokenizer.decode(ids, skip_special_tokens=True)} for ids in drawn]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
