"""Names of transformers' training arguments, which differ between the versions that this project takes."""

from __future__ import annotations

from dataclasses import fields

from transformers import TrainingArguments


def checkpointing(*, on: bool) -> dict[str, bool]:
    """Whether activations are made anew in the backward pass; the old name warns where the new one exists."""
    known = {field.name for field in fields(TrainingArguments)}
    return {"activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing": on}
