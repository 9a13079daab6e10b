"""The whole configuration of a run: one flat, typed record, each field documented where it stands.

Names follow TRL's ``GRPOConfig`` where it has one. The same record is read from TOML, from the command line and in
Python, and is written back, resolved, into every run. Nothing here imports torch.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import tomli_w
from cyclopts import Group, Parameter
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from grpo_fast.consistency import check_consistency
from grpo_fast.explain import explain
from grpo_fast.given_values import ONE_OR_SEVERAL, SchedulerType, dataset_anywhere, expanded, model_anywhere, refuse_switches
from grpo_fast.json_object import JsonObject

LossType = Literal["grpo", "dr_grpo", "bnpo", "dapo", "cispo", "gspo", "rloo", "luspo", "sapo"]
ImportanceMode = Literal[
    "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_truncate", "geometric_mask"
]

_MICROBATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
_GROUPS = ("Model", "LoRA", "Data", "Reward", "Rollout", "Objective", "Optimiser", "Budget", "Forecast", "Run")
_MODEL, _LORA, _DATA, _REWARD, _ROLLOUT, _OBJECTIVE, _OPTIM, _BUDGET, _FORECAST, _RUN = (
    Parameter(group=Group(name, sort_key=place)) for place, name in enumerate(_GROUPS, start=1)
)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field, the value and the fix."""


class Config(BaseModel):
    """Everything that decides a run. Frozen; make a changed copy with :meth:`replace`.

    Raises:
        ConfigError: an unknown field (the nearest known one is named), a bad type, a value out of range, or fields that do not
            go together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    model: Annotated[str, AfterValidator(model_anywhere), _MODEL] = "embedded"
    """Causal language model, or LoRA adapters of one: a directory, a hub id, or ``embedded`` for the package's tiny one."""
    revision: Annotated[str | None, _MODEL] = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: Annotated[bool, _MODEL] = False
    """Run modelling code that comes with the model."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], _MODEL] = "auto"
    """Type that forward and backward compute in (weights that are trained stay float32, frozen ones take it on); ``auto`` is
    bfloat16 on a GPU that has it, float32 elsewhere."""
    device: Annotated[Literal["auto", "cpu", "cuda"], _MODEL] = "auto"
    """Where the policy lives; ``auto`` takes the GPU where there is one."""
    attn_implementation: Annotated[str, _MODEL] = "auto"
    """Attention of transformers: ``sdpa``, ``eager``, ``flash_attention_2``, ...; ``auto`` is ``sdpa`` where the model has it
    (Gemma 2 has not), else ``eager``."""
    padding_free: Annotated[bool | None, _MODEL] = None
    """Train on sequences in one row, none padded; ``None`` does so where the model's attention can be told their borders."""
    share_prompts: Annotated[bool | None, _MODEL] = None
    """Compute a prompt once for its packed completions: 1.7 to 3.7 times as fast as padded, prompts of 30 to 300 tokens.
    ``None`` does so on a CPU, where ``sdpa`` or ``eager`` packs; on a GPU it has not been measured."""
    gradient_checkpointing: Annotated[bool, _MODEL] = False
    """Recompute activations in the backward pass: a third more compute for much less memory."""
    gradient_checkpointing_mode: Annotated[Literal["full", "selective", "offload"], _MODEL] = "full"
    """Recompute whole layers, or keep what their matrix products and attention gave: cheaper to recompute, more to keep.
    ``offload``: whole layers, with their inputs in the host's memory; for GPUs."""

    use_liger_kernel: Annotated[bool, _MODEL] = False
    """Liger's kernels for norms, rotary positions and gated activations; not for the loss, which is fused here. For GPUs, where
    it has not been measured yet."""

    torch_compile: Annotated[bool, _MODEL] = False
    """Compile the model's layers for training; sampling stays as it is. On a CPU it gains little: 0.97 of the time on the
    embedded model, 1.00 on SmolLM2-135M, after half a minute of compilation. On a GPU it has not been measured."""

    use_peft: Annotated[bool, _LORA] = False
    """Train LoRA adapters over frozen weights: new ones, or those that ``model`` names. The reference policy has them off, or
    as they were saved. They have no dropout: it would keep the ratio of an on-policy step from being 1."""
    base_model: Annotated[str | None, AfterValidator(lambda name: name and model_anywhere(name)), _LORA] = None
    """Model under adapters that ``model`` names, in place of the one that they name themselves."""
    lora_r: Annotated[int, _LORA] = Field(16, ge=1)
    """Rank of the adapters."""
    lora_alpha: Annotated[int, _LORA] = Field(32, ge=1)
    """Their update is multiplied by ``lora_alpha / lora_r``."""
    use_rslora: Annotated[bool, _LORA] = False
    """Multiply it by ``lora_alpha / sqrt(lora_r)`` instead."""
    lora_target_modules: Annotated[tuple[str, ...], ONE_OR_SEVERAL, _LORA] = ("all-linear",)
    """Modules with an adapter, by the ends of their names (``q_proj``, ...); ``all-linear``: every linear layer but the
    head."""

    load_in_4bit: Annotated[bool, _LORA] = False
    """Keep the frozen base in four bits, by bitsandbytes (QLoRA)."""
    bnb_4bit_quant_type: Annotated[Literal["nf4", "fp4"], _LORA] = "nf4"
    """Which numbers four bits stand for: quantiles of a normal distribution, or a tiny floating-point type."""
    use_bnb_nested_quant: Annotated[bool, _LORA] = False
    """Quantise the scales too, to 8 bits: 0.4 bits a weight less."""

    dataset: Annotated[str, AfterValidator(dataset_anywhere), _DATA] = "arithmetic"
    """``arithmetic``, ``gsm8k``, ``countdown``, ``reasoning_gym:TASK``, a hub id, or a directory, parquet, JSONL or
    CSV file with a ``prompt`` column."""
    dataset_config: Annotated[str | None, _DATA] = None
    """Named configuration of a hub dataset."""
    dataset_split: Annotated[str, _DATA] = "train"
    """Split that is trained on."""
    eval_split: Annotated[str | None, _DATA] = None
    """Split that evaluation reads; without one, ``eval_size`` rows are held out of the training split."""
    prompt_column: Annotated[str, _DATA] = "prompt"
    """Column of the prompts in a dataset of one's own; it becomes ``prompt``."""
    answer_column: Annotated[str, _DATA] = "answer"
    """Column of the right answers, which the built-in rewards compare with; it becomes ``answer``."""
    dataset_size: Annotated[int, _DATA] = Field(2048, ge=1)
    """Rows made by generated tasks (``arithmetic``, ``countdown``, ``reasoning_gym``)."""
    system_prompt: Annotated[str | None, _DATA] = None
    """Put before every prompt as a system message; makes plain prompts chat messages."""
    chat_template_kwargs: Annotated[JsonObject, _DATA] = Field(default_factory=dict)
    """Variables of the chat template, such as ``{"enable_thinking": false}`` for Qwen3: JSON on the command line."""
    max_prompt_length: Annotated[int | None, _DATA] = Field(None, ge=1)
    """Longest prompt, in tokens; ``None`` takes what the model's context leaves."""
    overlong_prompts: Annotated[Literal["error", "drop"], _DATA] = "error"
    """What to do with a prompt that is longer: refuse to start, or leave it out and say how many were."""
    shuffle: Annotated[bool, _DATA] = True
    """Visit the prompts in a new random order each epoch."""

    reward_funcs: Annotated[tuple[str, ...], ONE_OR_SEVERAL, _REWARD] = ()
    """Reward functions: built-in names (``accuracy``, ``format``, ...) or ``module:function``; empty takes the task's own."""
    reward_weights: Annotated[tuple[float, ...], _REWARD] = ()
    """One weight a reward function; empty weighs all by 1."""
    reward_range: Annotated[tuple[float, float] | None, _REWARD] = None
    """Least and greatest mean reward that is possible, where that is known; it sharpens the forecast."""
    reward_timeout_s: Annotated[float, _REWARD] = Field(30.0, gt=0)
    """Deadline of one reward call, in seconds; a worker that misses it is killed."""
    reward_workers: Annotated[int, _REWARD] = Field(1, ge=0)
    """Processes that run reward functions; 0 runs them in the trainer's process, without a deadline."""
    reward_on_error: Annotated[Literal["raise", "none"], _REWARD] = "raise"
    """A reward call that raises, hangs or returns the wrong length: end the run with a named error, or count it as ``None``."""

    rollout: Annotated[Literal["transformers", "vllm", "vllm-http"], _ROLLOUT] = "transformers"
    """Engine that samples completions: the policy itself, vLLM in the trainer's process, or vLLM's servers on this machine."""
    vllm_server_urls: Annotated[tuple[str, ...], ONE_OR_SEVERAL, _ROLLOUT] = ()
    """Addresses of those servers, such as ``http://127.0.0.1:8000``; ``grpo-fast serve`` starts one."""
    vllm_gpu_memory_utilization: Annotated[float, _ROLLOUT] = Field(0.3, gt=0, le=1)
    """Share of the GPU's memory that vLLM takes for its weights and its cache."""
    vllm_kv_cache_gib: Annotated[float | None, _ROLLOUT] = Field(None, gt=0)
    """Memory of vLLM's cache, in GiB, in place of what that share leaves."""
    vllm_engine_args: Annotated[JsonObject, _ROLLOUT] = Field(default_factory=dict)
    """Other arguments of vLLM's engine, such as ``{"enforce_eager": true, "max_num_seqs": 64}``; a server is started with its
    own."""
    vllm_enable_sleep_mode: Annotated[bool, _ROLLOUT] = False
    """Let vLLM sleep while the policy trains: its memory on the GPU is the trainer's then (with adapters, its weights go to the
    host's). Servers need ``grpo-fast serve --enable-sleep-mode``."""
    vllm_own_process: Annotated[bool, _ROLLOUT] = False
    """Have ``rollout='vllm'`` run in a process of its own: with ``max_staleness`` it is less in the trainer's way."""
    vllm_transport: Annotated[Literal["auto", "shared_memory", "sparse", "ipc", "nccl"], _ROLLOUT] = "auto"
    """How weights reach vLLM: by ``auto`` directly within the trainer's process, else through shared memory. ``sparse`` sends
    what changed alone, for a copy of the weights in host memory at either end. ``ipc`` (a process on the same GPU) and ``nccl``
    (a server on other GPUs) are vLLM's own; ``grpo-fast serve --transport`` must say the same."""
    sync_deadline_s: Annotated[float, _ROLLOUT] = Field(300.0, gt=0)
    """Longest time of each phase of a weight sync, in seconds; a phase that takes longer ends the run with a checkpoint."""
    request_deadline_s: Annotated[float, _ROLLOUT] = Field(1800.0, gt=0)
    """Longest time, in seconds, that a vLLM server may take for the completions of one prompt, its wait for a place included,
    and vLLM's own process for one step; what takes longer ends the run with a checkpoint."""
    prompts_per_step: Annotated[int, _ROLLOUT] = Field(16, ge=1)
    """P: prompts of a step."""
    num_generations: Annotated[int, _ROLLOUT] = Field(8, ge=2)
    """G: completions of a prompt; a group."""
    max_completion_length: Annotated[int, _ROLLOUT] = Field(256, ge=1)
    """Longest completion, in tokens; with an environment all turns together, and what it says between them."""
    temperature: Annotated[float, _ROLLOUT] = Field(1.0, gt=0)
    """Sampling temperature; log-probabilities of the trainer are taken at the same one."""
    top_p: Annotated[float, _ROLLOUT] = Field(1.0, gt=0, le=1)
    """Nucleus sampling. Where ``top_p``, ``top_k`` or ``min_p`` cut the support, policy and reference are taken over the tokens
    they left too: in ratio, KL, entropy and gradient. With ``top_k`` vLLM has the least to tell of them."""
    top_k: Annotated[int, _ROLLOUT] = Field(0, ge=0)
    """Keep the k most probable tokens; 0 keeps all."""
    min_p: Annotated[float, _ROLLOUT] = Field(0.0, ge=0, lt=1)
    """Drop tokens under this share of the top probability; 0 drops none."""
    stop: Annotated[tuple[str, ...], ONE_OR_SEVERAL, _ROLLOUT] = ()
    """Strings that end a completion; with an environment, a turn of it."""
    environment_factory: Annotated[str | None, _ROLLOUT] = None
    """Class whose instances answer the policy between its turns, as ``module:Class``: a game, a sandbox, a search. It has a
    method ``step``, or, as in TRL, methods that are tools."""
    tools: Annotated[tuple[str, ...], ONE_OR_SEVERAL, _ROLLOUT] = ()
    """Functions that the policy may call, as ``module:function``, described by their type hints and docstrings."""
    max_turns: Annotated[int, _ROLLOUT] = Field(8, ge=1)
    """How often the policy speaks in a completion at most, where there is an environment or tools."""
    environment_timeout_s: Annotated[float, _ROLLOUT] = Field(60.0, gt=0)
    """Longest time of one call of an environment, in seconds; what takes longer ends the run with a checkpoint."""
    environment_workers: Annotated[int, _ROLLOUT] = Field(16, ge=1)
    """Environments that are called at a time."""
    max_staleness: Annotated[int, _ROLLOUT] = Field(0, ge=0)
    """Updates by which the weights that sample lag behind: above 0, rollouts of so many later steps are made while this one
    trains. 1 hides the shorter of the two behind the longer."""
    vllm_pause_mode: Annotated[Literal["wait", "keep"], _ROLLOUT] = "wait"
    """What an update does with rollouts that run beside the training: wait for their end, or keep them, so that they go on by
    the new weights. Timing then decides which weights sample a token; each token's version is known all the same."""
    refill_rounds: Annotated[int, _ROLLOUT] = Field(0, ge=0)
    """How often a step may sample further prompts in place of groups without reward variance; 0 never refills."""

    loss_type: Annotated[LossType, _OBJECTIVE] = "dapo"
    """Row of the objective table."""
    beta: Annotated[float, _OBJECTIVE] = Field(0.0, ge=0)
    """Weight of the KL term to the reference policy; 0 loads no reference."""
    epsilon: Annotated[float, _OBJECTIVE] = Field(0.2, gt=0)
    """Lower (and, without ``epsilon_high``, upper) clip range of the ratio."""
    epsilon_high: Annotated[float | None, _OBJECTIVE] = Field(None, gt=0)
    """Upper clip range; for ``cispo`` the absolute cap of the ratio."""
    delta: Annotated[float | None, _OBJECTIVE] = Field(None, gt=1)
    """Upper bound of the ratio for negative advantages too (two-sided clipping)."""
    entropy_coef: Annotated[float, _OBJECTIVE] = Field(0.0, ge=0)
    """Weight of an entropy bonus."""
    sapo_temperature_pos: Annotated[float, _OBJECTIVE] = Field(1.0, gt=0)
    """SAPO's gate temperature for positive advantages."""
    sapo_temperature_neg: Annotated[float, _OBJECTIVE] = Field(1.05, gt=0)
    """SAPO's gate temperature for negative advantages."""
    scale_rewards: Annotated[Literal["group", "batch", "none"], _OBJECTIVE] = "group"
    """Divide centred rewards by the group's standard deviation, the batch's, or not at all."""
    multi_objective_aggregation: Annotated[Literal["sum_then_normalize", "normalize_then_sum"], _OBJECTIVE] = (
        "sum_then_normalize"
    )
    """How several rewards become one advantage: by their sum, or each scaled in its group, added, and scaled once more over the
    batch (GDPO), so that none drowns in another."""
    mask_truncated_completions: Annotated[bool, _OBJECTIVE] = False
    """Leave completions that the length limit cut out of the loss."""
    vllm_importance_sampling_correction: Annotated[bool | None, _OBJECTIVE] = None
    """Weigh tokens by the policy's probability over the sampler's, at the price of a forward pass; ``None`` does so where vLLM
    samples, or weights that lag behind."""
    vllm_importance_sampling_mode: Annotated[ImportanceMode, _OBJECTIVE] = "sequence_mask"
    """Ratio of the token, of its sequence or of the sequence's geometric mean; cut off at the bounds, or 0 beyond them."""
    vllm_importance_sampling_clip_max: Annotated[float | None, _OBJECTIVE] = Field(3.0, gt=0)
    """Greatest such ratio."""
    vllm_importance_sampling_clip_min: Annotated[float | None, _OBJECTIVE] = Field(None, ge=0)
    """Least such ratio."""
    bypass_old_logprobs: Annotated[bool, _OBJECTIVE] = False
    """Take the sampler's log-probabilities for the old ones: the clip bounds the ratio to the sampler, nothing corrects it."""
    keep_dead_rows_for_metrics: Annotated[bool, _OBJECTIVE] = False
    """Score completions without gradient too (groups without reward variance), so that ``entropy``, ``kl`` and ``clip_ratio``
    are means over all tokens in the loss, as TRL's are; it costs a forward pass of each."""
    num_iterations: Annotated[int, _OBJECTIVE] = Field(1, ge=1)
    """Optimiser updates on the completions of one step."""

    optim: Annotated[Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"], _OPTIM] = (
        "adamw_torch_fused"
    )
    """AdamW by torch, or by bitsandbytes: with moments of 8 bits (2 bytes a weight, not 8), or in memory that pages to the
    host."""
    offload_optimizer: Annotated[bool, _OPTIM] = False
    """Keep moments and a float32 copy of the weights in host memory, and update them there."""
    weights_dtype: Annotated[Literal["float32", "bfloat16"], _OPTIM] = "float32"
    """Type of trained weights and their gradients. Updates of bfloat16 weights are rounded up or down at random, so that small
    ones count in the mean; with ``offload_optimizer`` they are made in the float32 copy instead."""
    learning_rate: Annotated[float, _OPTIM] = Field(1e-6, gt=0)
    """Peak learning rate."""
    lr_scheduler_type: Annotated[SchedulerType, _OPTIM] = "constant"
    """Shape of the learning rate after warm-up, over ``max_steps``; one of transformers' schedules."""
    lr_scheduler_kwargs: Annotated[JsonObject, _OPTIM] = Field(default_factory=dict)
    """Its other arguments, such as ``{"min_lr_rate": 0.1}`` for ``cosine_with_min_lr``."""
    warmup_steps: Annotated[float, _OPTIM] = Field(0, ge=0)
    """Steps over which the learning rate rises from 0, by every schedule; below 1, a share of ``max_steps``."""
    weight_decay: Annotated[float, _OPTIM] = Field(0.0, ge=0)
    """Decoupled weight decay."""
    adam_beta1: Annotated[float, _OPTIM] = Field(0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    adam_beta2: Annotated[float, _OPTIM] = Field(0.999, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    adam_epsilon: Annotated[float, _OPTIM] = Field(1e-8, gt=0)
    """AdamW's denominator floor."""
    max_grad_norm: Annotated[float, _OPTIM] = Field(1.0, ge=0)
    """Clip the global gradient norm to this; 0 never clips."""
    tokens_per_microbatch: Annotated[int | None, _OPTIM] = Field(None, ge=1)
    """Largest size, in tokens, padding included, of one forward and backward pass; changes memory, not results. ``None`` is
    2,048 on a CPU, where more is no faster, and 16,384 on a GPU."""

    max_steps: Annotated[int, _BUDGET] = Field(500, ge=1)
    """Steps at most; also the horizon of schedules and forecasts."""
    max_tokens: Annotated[float | None, _BUDGET] = Field(None, gt=0)
    """Prompt and completion tokens at most."""
    max_flops: Annotated[float | None, _BUDGET] = Field(None, gt=0)
    """Model FLOPs at most, all phases."""
    max_gpu_hours: Annotated[float | None, _BUDGET] = Field(None, gt=0)
    """Device hours at most (on a machine without a GPU, the CPU counts as one device)."""
    max_wall_hours: Annotated[float | None, _BUDGET] = Field(None, gt=0)
    """Hours of wall-clock time at most."""
    max_money: Annotated[float | None, _BUDGET] = Field(None, gt=0)
    """Money at most, in the currency of ``price_per_gpu_hour``."""
    max_energy_kwh: Annotated[float | None, _BUDGET] = Field(None, gt=0)
    """Energy at most, in kWh."""
    price_per_gpu_hour: Annotated[float, _BUDGET] = Field(0.0, ge=0)
    """Price of a device hour."""

    forecast: Annotated[Literal["off", "warn", "ask", "stop"], _FORECAST] = "stop"
    """What a forecast plateau does: nothing (and no forecast), one message, a question on the terminal, the end of the run."""
    forecast_epsilon: Annotated[float, _FORECAST] = Field(0.01, gt=0)
    """Remaining gain of the reward under which going on is not worth it."""
    forecast_confidence: Annotated[float, _FORECAST] = Field(0.78, gt=0.5, lt=1)
    """Probability of so small a gain that a stop demands; the expected gain must be that small too."""
    forecast_patience: Annotated[float, _FORECAST] = Field(0.07, gt=0)
    """For how long that must hold without a break: below 1 a share of ``max_steps``, from 1 on a number of steps."""
    forecast_reward_value: Annotated[float | None, _FORECAST] = Field(None, gt=0)
    """Money that one unit of reward is worth: a run also stops where no way on is expected to bring what it costs. It needs
    ``price_per_gpu_hour``."""
    forecast_prior: Annotated[Path | None, _FORECAST, AfterValidator(lambda path: path and expanded(path).absolute())] = None
    """What is believed of runs beforehand: a file that ``grpo-fast law fit`` wrote; the package's own without one."""
    forecast_min_steps: Annotated[int, _FORECAST] = Field(20, ge=5)
    """Steps before which no forecast stops a run; nor does one before the learning rate is warm."""
    baseline_probe: Annotated[int, _FORECAST] = Field(64, ge=0)
    """Training prompts that the untrained policy answers once each before step 1: where the forecast starts; 0 for none."""
    collapse_action: Annotated[Literal["off", "warn", "stop"], _FORECAST] = "stop"
    """What a collapse of the policy does: nothing, a message, the end of the run; the best checkpoint from before is kept."""

    output_dir: Annotated[Path, AfterValidator(expanded), _RUN] = Path("runs/grpo")
    """Where metrics, checkpoints and the report of the run go."""
    overwrite: Annotated[bool, _RUN] = False
    """Delete a run that is already in ``output_dir``; otherwise it is refused (resume it instead)."""
    resume_if_exists: Annotated[bool, _RUN] = False
    """Go on with a run that is already in ``output_dir``, and begin one where there is none: a command that may be given again,
    by a scheduler or after a crash."""
    seed: Annotated[int, _RUN] = Field(0, ge=0)
    """Decides data order, sampling and every other random draw."""
    eval_steps: Annotated[int, _RUN] = Field(0, ge=0)
    """Evaluate on held-out prompts every so many steps, and at the end; 0 never."""
    eval_size: Annotated[int, _RUN] = Field(256, ge=1)
    """Held-out prompts of an evaluation."""
    eval_temperature: Annotated[float, _RUN] = Field(0.0, ge=0)
    """Temperature of answers to held-out prompts; 0 takes the likeliest tokens, by which thinking models may go round."""
    num_generations_eval: Annotated[int, _RUN] = Field(1, ge=1)
    """Answers to each held-out prompt, whose rewards are averaged."""
    save_steps: Annotated[int, _RUN] = Field(50, ge=1)
    """Checkpoint every so many steps, after an evaluation better than any before, and at the end."""
    save_total_limit: Annotated[int, _RUN] = Field(2, ge=1)
    """Newest checkpoints kept, beside the best one, and beside the best one from before a fall that may be a collapse."""
    sinks: Annotated[tuple[Literal["console", "tensorboard", "wandb", "trackio"], ...], ONE_OR_SEVERAL, _RUN] = ("console",)
    """Where metrics go beside the JSONL files."""
    fsdp: Annotated[Literal["no_shard", "full_shard", "shard_grad_op", "hybrid_shard"], _RUN] = "no_shard"
    """What processes of ``torchrun`` hold in parts: nothing; weights, gradients and moments; the same, but weights stay whole
    from forward to backward; the same within a node, with a copy on each."""
    fsdp_offload_params: Annotated[bool, _RUN] = False
    """Keep the shards in host memory."""
    fsdp_parallel_head: Annotated[bool, _RUN] = False
    """Leave the head in parts of the vocabulary and gather hidden rows in its place: less memory for large vocabularies."""
    ddp_timeout_s: Annotated[float, _RUN] = Field(1800.0, gt=0)
    """Longest wait for another process under ``torchrun``, in seconds; one that hangs ends the run then."""
    log_completions: Annotated[int, _RUN] = Field(4, ge=0)
    """Sample completions written to ``completions.jsonl`` each step."""
    report: Annotated[bool, _RUN] = True
    """Write ``report.html`` and its pictures at the end."""

    if not TYPE_CHECKING:  # type checkers and editors shall see the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                told = (explain(item, known=type(self).model_fields) for item in error.errors())
                raise ConfigError("\n".join(told)) from None

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, values: Any) -> Any:
        return refuse_switches(values, cls.model_fields)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_consistency(self)
        return self

    @property
    def num_warmup_steps(self) -> int:
        """Steps of warm-up, a share turned into steps (rounded up, as transformers does)."""
        return math.ceil(self.warmup_steps * self.max_steps) if self.warmup_steps < 1 else int(self.warmup_steps)

    @property
    def truncates_support(self) -> bool:
        """Whether sampling leaves out part of the softmax."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def support_text(self) -> str:
        """What cuts the support, in words for an error."""
        return f"top_p={self.top_p:g}, top_k={self.top_k}, min_p={self.min_p:g}"

    @property
    def corrects_sampler(self) -> bool:
        """Whether importance weights correct for the sampler."""
        wanted = self.vllm_importance_sampling_correction
        if wanted is None:
            wanted = self.rollout != "transformers" or self.max_staleness > 0
        return wanted and not self.bypass_old_logprobs

    def microbatch_tokens(self, kind: str) -> int:
        """``tokens_per_microbatch`` on a device ("cuda" or "cpu")."""
        return self.tokens_per_microbatch or _MICROBATCH_TOKENS[kind]

    @property
    def recomputes_products(self) -> bool:
        """Whether the backward pass runs a layer's matrix products once more."""
        return self.gradient_checkpointing and self.gradient_checkpointing_mode != "selective"

    @property
    def scoring_passes(self) -> tuple[bool, ...]:
        """Passes without gradient over what a step trains on; of each, whether adapters take part.

        They do not in the reference policy's, and do in that against the sampler.
        """
        return (False,) * (self.beta > 0) + (True,) * self.corrects_sampler

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Config:
        """Builds a configuration from plain values; it raises what the constructor does."""
        return cls(**values)

    @classmethod
    def from_toml(cls, path: str | Path) -> Config:
        """Reads a TOML file.

        Raises:
            ConfigError: the file is missing, is not TOML or does not fit.
        """
        return cls.parse(read_toml(path))

    def to_toml(self) -> str:
        """The resolved configuration as TOML; fields that are ``None`` are left out, as TOML has no null."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def replace(self, **changes: Any) -> Config:
        """A changed copy, validated; it raises what :meth:`parse` does."""
        return self.parse(self.model_dump() | changes)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Reads a TOML file into plain values.

    Raises:
        ConfigError: the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
