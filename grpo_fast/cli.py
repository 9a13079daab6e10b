"""The command line: thin, no logic of its own."""

from __future__ import annotations

import faulthandler
import signal
import sys
from contextlib import suppress
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Group, Parameter, validators
from rich.console import Console
from rich.markup import escape

from grpo_fast import __version__
from grpo_fast.cli_end import after_end, after_interrupt, begun_at, code_of, fail, tell_outcome, telling
from grpo_fast.cli_evaluate import evaluate
from grpo_fast.cli_files import ToDraw, ToWrite
from grpo_fast.cli_report import compare, report
from grpo_fast.cli_settings import fill
from grpo_fast.cli_tables import print_json, print_notes, print_table, print_words, print_written
from grpo_fast.config import Config

if TYPE_CHECKING:
    from grpo_fast.train.plan import Plan

_SOURCE = Group("Where the configuration comes from", sort_key=0)
_PLAN = Group("Plan", sort_key=0.5)

app = App(
    name="grpo-fast",
    version=__version__,
    help="Train reasoning models with GRPO, meter the compute, and stop when the reward is forecast to plateau.",
    help_format="restructuredtext",
    default_parameter=Parameter(negative_iterable=(), consume_multiple=True),
    config=(fill,),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)


@app.command
def train(
    *,
    recipe: Annotated[str | None, Parameter(group=_SOURCE)] = None,
    config: Annotated[Path | None, Parameter(group=_SOURCE)] = None,
    resume: Annotated[Path | None, Parameter(group=_SOURCE)] = None,
    settings: Annotated[Config, Parameter(name="*")] = Config(),  # noqa: B008 (frozen)
) -> int:
    """Train a model with GRPO.

    Settings come from a recipe, then a TOML file, then the flags below; the last one wins. Without a recipe, a file and
    ``--model``, the small demo model in the package is trained, by the recipe ``embedded``.

    Ctrl-C or SIGTERM saves the run after the step, and ends with exit code 130 or 143; a second one ends it at once. To begin
    or resume by the same command, add ``--resume-if-exists``.

    Args:
        recipe: A named configuration of the package, such as ``embedded``.
        config: A TOML file of the settings below (underscores in place of hyphens).
        resume: Resume this run from its newest checkpoint, with its own configuration; flags may change its limits.
        settings: The configuration.
    """
    del recipe, config  # already in the settings
    from grpo_fast.train import GRPOTrainer  # noqa: PLC0415 (--help must not wait for torch)

    run = resume or settings.output_dir
    told = partial(after_interrupt, run, older=begun_at(run) if settings.overwrite else None)
    try:
        with GRPOTrainer.resume(resume, config=settings) if resume is not None else GRPOTrainer(settings) as trainer:
            if trainer.is_main_process and "model" not in settings.model_fields_set:
                Console().print("no model given (--model): training the small demo model in the package", highlight=False)
            with telling():  # before the close, in which a server that hangs takes time: torchrun ends ranks as one has left
                summary = trainer.train()
            told = partial(after_end, run, has_step=bool(summary["step"]))
        if not trainer.is_main_process:
            return 0
        tell_outcome(run, summary, has_adapters=settings.use_peft)
        if settings.report and summary["step"]:
            report(run)
    except KeyboardInterrupt as interrupt:
        interrupt.args = (told(),)
        raise
    return 0 if summary["signal"] is None else code_of(signal.Signals[summary["signal"]])


@app.command
def plan(  # noqa: PLR0913 (flags)
    *,
    recipe: Annotated[str | None, Parameter(group=_SOURCE)] = None,
    config: Annotated[Path | None, Parameter(group=_SOURCE)] = None,
    probe: Annotated[int, Parameter(group=_PLAN)] = 0,
    start_reward: Annotated[float | None, Parameter(group=_PLAN)] = None,
    model_size: Annotated[float | None, Parameter(group=_PLAN)] = None,
    lora: Annotated[bool, Parameter(group=_PLAN, negative="")] = False,
    prompt_tokens: Annotated[float | None, Parameter(group=_PLAN)] = None,
    data_size: Annotated[int | None, Parameter(group=_PLAN)] = None,
    completion_tokens: Annotated[float | None, Parameter(group=_PLAN)] = None,
    seconds_per_step: Annotated[float | None, Parameter(group=_PLAN)] = None,
    mfu: Annotated[float | None, Parameter(group=_PLAN)] = None,
    gpu: Annotated[str | None, Parameter(group=_PLAN)] = None,
    num_devices: Annotated[int, Parameter(group=_PLAN)] = 1,
    plot: Annotated[ToDraw | None, Parameter(group=_PLAN)] = None,
    json: Annotated[bool, Parameter(group=_PLAN, negative="")] = False,
    settings: Annotated[Config, Parameter(name="*")] = Config(),  # noqa: B008 (frozen)
) -> int:
    """Predict reward, cost and memory of a run before starting it.

    Settings are those of ``train``, from the same places; the budget is whichever ``--max-...`` is reached first. The exit
    code is 1 if the run would not fit into the device's memory; the output then names the changes that make it fit.

    Args:
        recipe: A named configuration of the package, such as ``embedded``.
        config: A TOML file of the settings below.
        probe: Load the model, let it answer this many training prompts, and time a step.
        start_reward: Mean reward of the untrained policy, if known.
        model_size: Parameters in 1e9, to plan without a model.
        lora: Plan for LoRA adapters rather than all weights.
        prompt_tokens: Mean length of a prompt; with ``--data-size`` no data is read.
        data_size: Number of prompts, in place of the dataset's own.
        completion_tokens: Mean length of a completion.
        seconds_per_step: Wall-clock seconds per step.
        mfu: Share of the device's peak FLOP/s that the run will reach. Default: 0.1.
        gpu: The device, as CUDA names it (``H100 80GB HBM3``). Default: this machine's.
        num_devices: Number of devices that the run uses.
        plot: Write a plot to this PNG file.
        json: Print one JSON object instead of the tables.
        settings: The configuration.
    """
    del recipe, config  # already in the settings
    from grpo_fast.train.plan import make_plan  # noqa: PLC0415 (--help must not wait for torch)
    from grpo_fast.train.plan_facts import PlanInputs  # noqa: PLC0415 (as above)

    inputs = PlanInputs(
        probe=probe,
        start_reward=start_reward,
        model_size=model_size,
        lora=lora,
        prompt_tokens=prompt_tokens,
        data_size=data_size,
        completion_tokens=completion_tokens,
        seconds_per_step=seconds_per_step,
        mfu=mfu,
        gpu=gpu,
        num_devices=num_devices,
    )
    found = make_plan(settings, inputs)
    _tell_plan(found, plot=plot, json=json)
    return 0 if found.memory is None or found.memory.fits else 1


def _tell_plan(found: Plan, *, plot: Path | None, json: bool) -> None:
    if plot is not None:
        from grpo_fast.report.plan_plot import write_plan_plot  # noqa: PLC0415 (matplotlib is slow to import)

        write_plan_plot(plot, found.to_dict())
    if json:
        print_json(found.to_dict())
    else:
        _print_plan(found, plot)


def _print_plan(found: Plan, plot: Path | None) -> None:
    from grpo_fast.train.plan_memory import refusal, table  # noqa: PLC0415 (as above)

    console = Console()
    print_words(console, found.to_words())
    print_table(console, ("", "step", "reward", "50 % interval", "90 % interval"), found.trajectory_words())
    print_table(console, ("", "a step", "the run", "90 % interval", "by 95 % of the rise"), found.cost_words())
    if found.memory is not None:
        print_table(console, ("memory of a device", ""), table(found.memory))
    print_notes(console, found.notes)
    print_written(console, plot)
    if found.memory is not None and not found.memory.fits:
        console.print(f"\n[bold red]It does not fit:[/] {escape(refusal(found.memory, found.changes))}", highlight=False)


app.command(evaluate)
app.command(report)
app.command(compare)


@app.command
def forecast(  # noqa: PLR0913 (flags)
    log: Path,
    *,
    reward_column: str | None = None,
    run: str | None = None,
    max_steps: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
    epsilon: float | None = None,
    confidence: float | None = None,
    reward_range: tuple[float, float] | None = None,
    num_prompts: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
    num_generations: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None,
    prior: Path | None = None,
    plot: ToDraw | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Forecast the final reward of a run from its log, and say when the stopping rule would have ended it.

    It reads transformers' ``trainer_state.json``, runs of grpo_fast, JSON lines, console logs of verl, OpenRLHF, TRL, ms-swift
    and slime, exports of W&B and TensorBoard, TensorBoard's event directories, and plain CSV, gzipped or not.

    Args:
        log: The file, or the directory of a run.
        reward_column: Column of the reward, if the guess is wrong or ambiguous.
        run: The run to read, if a column of the log separates several. Default: the last one.
        max_steps: Steps of the whole budget, if the log does not contain them.
        epsilon: Remaining gain that is not worth training for, in units of the reward.
        confidence: Stop when the gain left is below epsilon with this probability. Default: the run's own, else 0.78.
        reward_range: Lowest and highest possible mean reward.
        num_prompts: Prompts per step, if the log does not contain them; they determine how noisy the mean reward is.
        num_generations: Completions per prompt, if the log does not contain them.
        prior: Prior of the forecast, as written by ``law fit``. Default: the prior in the package.
        plot: Write a plot to this PNG file.
        json: Print one JSON object instead of the table.
    """
    from grpo_fast.integrations import forecast_log, read_log  # noqa: PLC0415 (each command imports what it needs)
    from grpo_fast.law import Prior  # noqa: PLC0415 (as above)

    result = forecast_log(
        read_log(log, reward_column=reward_column, run=run),
        max_steps=max_steps,
        epsilon=epsilon,
        confidence=confidence,
        reward_range=reward_range,
        num_prompts=num_prompts,
        num_generations=num_generations,
        prior=None if prior is None else Prior.load(prior),
    )
    if plot is not None:
        from grpo_fast.report.log_plot import LogBeliefs, write_log_plot  # noqa: PLC0415 (matplotlib is slow to import)

        beliefs = LogBeliefs(
            steps=result.log.steps,
            rewards=result.log.rewards,
            name=result.log.reward_column,
            horizon=result.horizon,
            rows=result.rows(),
            prior=result.prior_row(),
            shapes=result.shapes,
            stop_step=result.stop_step,
            epsilon=result.epsilon,
            confidence=result.confidence,
        )
        write_log_plot(plot, beliefs)
    if json:
        print_json(result.to_dict())
        return 0
    console = Console()
    print_words(console, result.to_words())
    print_notes(console, result.notes)
    print_written(console, plot)
    return 0


law = App(name="law", help="Fit the forecaster's prior to your own runs.")
app.command(law)


@law.command
def fit(
    *runs: Path,
    output: ToWrite,
    base: Path | None = None,
    model_size: float | None = None,
    lora: Annotated[bool, Parameter(negative="")] = False,
    plot: ToDraw | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Fit a prior to finished runs, for ``forecast --prior`` and ``train --forecast-prior``.

    It reads whatever ``forecast`` reads. Each run that you name counts as one; all runs found in a directory that you name
    count as one together.

    Args:
        runs: Runs, logs, or directories of them.
        output: Write the prior to this JSON file.
        base: The prior to start from. Default: the prior in the package.
        model_size: Parameters in 1e9, the same for all runs, if the logs do not contain them.
        lora: The runs trained adapters rather than all weights.
        plot: Write a plot of the prior before and after to this PNG file.
        json: Print one JSON object instead of the tables.
    """
    from grpo_fast.integrations.law_fit import fit_law  # noqa: PLC0415 (each command imports what it needs)
    from grpo_fast.law import Prior, RunFacts  # noqa: PLC0415 (as above)

    if not runs:
        raise ValueError("name at least one run: a directory or a log that `grpo-fast forecast` reads")
    facts = RunFacts(size_b=model_size, lora=lora)
    found = fit_law(runs, base=None if base is None else Prior.load(base), facts=facts)
    if plot is not None:
        from grpo_fast.report.prior_plot import write_prior_plot  # noqa: PLC0415 (matplotlib is slow to import)

        write_prior_plot(plot, found.to_dict())
    found.prior.save(output)
    if json:
        print_json({"output": str(output)} | found.to_dict())
        return 0
    console = Console()
    print_table(console, ("run", "counts with", "what it says"), found.run_words())
    print_table(console, ("a run like those", "before", "after"), found.belief_words())
    if found.errors:
        heads = ("after", "error before", "error after", "90 % held before", "held after")
        print_table(console, heads, found.error_words())
    print_notes(console, [found.verdict()])
    print_written(console, plot, output)
    return 0


@app.command
def serve(  # noqa: PLR0913 (what the command line offers)
    model: str = "embedded",
    *vllm_options: str,
    port: int = 8000,
    dtype: str | None = None,
    max_model_len: int | None = None,
    max_lora_rank: int | None = None,
    transport: Literal["auto", "shared_memory", "sparse", "ipc", "nccl"] = "auto",
    enable_sleep_mode: bool = False,
) -> None:
    """Start a vLLM server on this machine for ``train --rollout vllm-http``.

    The trainer sends it the weights; until then it answers from random ones. If VLLM_API_KEY is set, requests need that key.

    Args:
        model: Directory or hub id of the model to be trained, or ``embedded``.
        vllm_options: After ``--``, options of vLLM's own server, such as ``-- --tensor-parallel-size 2``.
        port: Port to listen on, on 127.0.0.1 only.
        dtype: Compute type; it should be the trainer's. Default: float32 on a CPU, bfloat16 on a GPU.
        max_model_len: Longest sequence, in tokens. Default: the model's context.
        max_lora_rank: Accept LoRA adapters up to this rank, for training with --use-peft.
        transport: How the trainer will send weights: the same as its --vllm-transport. ``auto`` is ``shared_memory``.
        enable_sleep_mode: Free GPU memory for the trainer while the policy trains, with its --vllm-enable-sleep-mode.
    """
    import torch  # noqa: PLC0415 (--help must not wait for torch)

    from grpo_fast.assets import embedded_model_dir  # noqa: PLC0415 (as above)
    from grpo_fast.rollout.vllm_server import become, server_command  # noqa: PLC0415 (as above)

    command = server_command(
        str(embedded_model_dir()) if model == "embedded" else model,
        port=port,
        on_cpu=not torch.cuda.is_available(),
        dtype=dtype,
        max_model_len=max_model_len,
        max_lora_rank=max_lora_rank,
        transport=transport,
        enable_sleep_mode=enable_sleep_mode,
        vllm_options=vllm_options,
    )
    become(command)


@app.command
def export(source: Path, *, output: Path, dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto") -> int:
    """Merge the adapters of a LoRA run into its base and write a plain model, for engines and tools without peft.

    Args:
        source: One checkpoint, or a run, of which the checkpoint named in its summary is taken.
        output: A new or empty directory.
        dtype: Type of the weights. Default: the type in the base model's files.
    """
    from grpo_fast.train.export import export_merged  # noqa: PLC0415 (--help must not wait for torch)

    checkpoint = export_merged(source, output, dtype=dtype)
    Console().print(f"wrote {output}, merged from {checkpoint}", highlight=False, markup=False, soft_wrap=True)
    return 0


@app.command
def doctor() -> int:
    """Check the installation and print the commands that fix it."""
    from grpo_fast.report.doctor import doctor as examine  # noqa: PLC0415 (each command imports what it needs)

    return examine(Console())


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; errors that the user can fix are one message without a traceback, exit code 1.

    Modules of the current folder can be named; those of Python and of packages come first, even under the same name. If a
    signal ends the process inside native code, every thread's Python stack is printed.
    """
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error does with names that its encoding lacks
    try:
        with telling():
            with suppress(FileNotFoundError):  # the current folder may be deleted
                here = str(Path.cwd())
                if not sys.flags.safe_path and here not in sys.path and "" not in sys.path:
                    sys.path.append(here)
            sys.exit(app(arguments, exit_on_error=False, print_error=False))
    except KeyboardInterrupt as interrupt:
        code = code_of(getattr(interrupt, "signal", signal.SIGINT))
        fail("; ".join(filter(None, ("stopped at once", str(interrupt)))), code=code)
