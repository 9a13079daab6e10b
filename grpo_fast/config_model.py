"""The settings of the trained model and its adapters: the first fields of :class:`grpo_fast.config.Config`."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Group, Parameter
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from grpo_fast.given_values import ONE_OR_SEVERAL, model_anywhere

_GROUPS = ("Model", "LoRA", "Data", "Reward", "Rollout", "Objective", "Optimiser", "Budget", "Forecast", "Run")


def group(name: str) -> Parameter:
    """The part of the command line's help that a field stands in."""
    return Parameter(group=Group(name, sort_key=1 + _GROUPS.index(name)))


_MODEL, _LORA = group("Model"), group("LoRA")


class ModelSettings(BaseModel):
    """What is trained, and how it is computed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    model: Annotated[str, AfterValidator(model_anywhere), _MODEL] = "embedded"
    """Causal language model, or LoRA adapters of one: a directory, a hub id, or ``embedded`` for the package's tiny one."""
    revision: Annotated[str | None, _MODEL] = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: Annotated[bool, _MODEL] = False
    """Run modelling code that comes with the model."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], _MODEL] = "auto"
    """Compute type of the forward and backward pass; frozen weights are cast to it, trained ones keep ``weights_dtype``.
    ``auto``: bfloat16 on a GPU that supports it, else float32."""
    device: Annotated[Literal["auto", "cpu", "cuda"], _MODEL] = "auto"
    """Device of the policy. ``auto``: the GPU if there is one, else the CPU."""
    attn_implementation: Annotated[str, _MODEL] = "auto"
    """Attention implementation of transformers: ``sdpa``, ``eager``, ``flash_attention_2``, ...; ``auto``: ``sdpa`` if the
    model supports it (Gemma 2 does not), else ``eager``."""
    padding_free: Annotated[bool | None, _MODEL] = None
    """Pack sequences into one row without padding. Default: on if the model's attention supports packed sequences."""
    share_prompts: Annotated[bool | None, _MODEL] = None
    """Compute each prompt once for all its completions: 1.7 to 3.7 times as fast as padding, for prompts of 30 to 300 tokens.
    Needs packing with ``sdpa`` or ``eager``. Default: on for a CPU with such packing; off for a GPU (not measured there)."""
    gradient_checkpointing: Annotated[bool, _MODEL] = False
    """Recompute activations in the backward pass: a third more compute for much less memory."""
    gradient_checkpointing_mode: Annotated[Literal["full", "selective", "offload"], _MODEL] = "full"
    """``full``: recompute whole layers. ``selective``: keep the outputs of matrix products and attention (faster, more memory).
    ``offload``: recompute whole layers and keep their inputs in host memory (GPU only)."""
    use_liger_kernel: Annotated[bool, _MODEL] = False
    """Use Liger's kernels for norms, rotary positions and gated activations, not for the loss. GPU only; not measured yet."""
    torch_compile: Annotated[bool, _MODEL] = False
    """Compile the model's layers for training, not for sampling. It gains little on a CPU: 0.97 of the time on the embedded
    model, 1.00 on SmolLM2-135M, after half a minute of compilation. Not measured on a GPU."""

    use_peft: Annotated[bool, _LORA] = False
    """Train LoRA adapters over frozen weights: new ones, or those that ``model`` names. The reference policy has them off, or
    as they were saved. They have no dropout, because with it the ratio of an on-policy step would not be 1."""
    base_model: Annotated[str | None, AfterValidator(lambda name: name and model_anywhere(name)), _LORA] = None
    """Base model of the adapters that ``model`` names. Default: the one that their own configuration names."""
    lora_r: Annotated[int, _LORA] = Field(16, ge=1)
    """Rank of the adapters."""
    lora_alpha: Annotated[int, _LORA] = Field(32, ge=1)
    """Scale of the adapters: their update is multiplied by ``lora_alpha / lora_r``."""
    use_rslora: Annotated[bool, _LORA] = False
    """Multiply the adapters' update by ``lora_alpha / sqrt(lora_r)`` instead (rsLoRA)."""
    lora_target_modules: Annotated[tuple[str, ...], ONE_OR_SEVERAL, _LORA] = ("all-linear",)
    """Modules that get an adapter, by the last part of their names (``q_proj``, ...). ``all-linear``: every linear layer except
    the head."""

    load_in_4bit: Annotated[bool, _LORA] = False
    """Keep the frozen base in four bits, by bitsandbytes (QLoRA)."""
    bnb_4bit_quant_type: Annotated[Literal["nf4", "fp4"], _LORA] = "nf4"
    """Data type of the four bits: quantiles of a normal distribution (``nf4``) or a 4-bit float (``fp4``)."""
    use_bnb_nested_quant: Annotated[bool, _LORA] = False
    """Quantise the scales to 8 bits too, which saves 0.4 bits per weight."""
