"""Files that travel inside the package: the embedded model and its tokenizer."""

from __future__ import annotations

from pathlib import Path


def embedded_model_dir() -> Path:
    """Directory of the embedded model, in the layout ``from_pretrained`` reads.

    Raises:
        FileNotFoundError: the package was installed without its data files.
    """
    directory = Path(__file__).parent / "embedded"
    if not (directory / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the embedded model is missing from {directory}; reinstall grpo-fast, or make it anew with "
            f"`python -m grpo_fast.tasks.pretrain_arithmetic --output {directory}`"
        )
    return directory
