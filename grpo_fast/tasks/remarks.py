"""Warnings about prompts, shown when a run starts."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_fast.tasks.encoded import token_ids_of
from grpo_fast.tasks.task import Rows, is_table
from grpo_fast.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MANY = 0.1
_SHOWN_CHARACTERS = 60
_ALL_WHOLE = 2.0**53  # up to it float64 holds every whole number
_MEDIA = ("Image", "Audio", "Video")


def repeats(prompts: Sequence[Prompt], eval_prompts: Sequence[Prompt], *, prompts_per_step: int) -> list[str]:
    """Remarks on prompts that come more than once.

    Two prompts are the same where their tokens are.

    Args:
        prompts: to train on.
        eval_prompts: held out.
        prompts_per_step: drawn for a step.

    Returns:
        A sentence each for: over a tenth of the prompts being repetitions, held-out prompts that are trained on too, and a step
        that goes through all prompts more than once. Empty where nothing is to be said.
    """
    known = {_key(token_ids) for token_ids in token_ids_of(prompts)}
    found = []
    if len(prompts) - len(known) > _MANY * len(prompts):
        found.append(f"only {len(known)} of {len(prompts)} prompts are distinct")
    seen = [prompt for prompt in eval_prompts if _key(prompt.token_ids) in known]
    if seen:
        found.append(
            f"{len(seen)} of {len(eval_prompts)} held-out prompts are trained on too, such as {_shown(seen[0])}, so the "
            "held-out reward does not measure new prompts; give another eval_split, or remove the repetitions"
        )
    if prompts_per_step > len(prompts):
        found.append(
            f"prompts_per_step={prompts_per_step} exceeds the number of prompts, {len(prompts)}: a step uses some of them "
            "more than once"
        )
    return found


def few_held_out(asked: int, found: int, *, num_prompts: int) -> list[str]:
    """A remark on fewer held-out prompts than were asked for.

    Args:
        asked: ``eval_size``, if somebody set it; else 0.
        found: prompts that are held out.
        num_prompts: prompts to train on.
    """
    if not 0 < found < asked:
        return []
    return [f"only {found} of the {asked} prompts of eval_size are held out, and {num_prompts} are trained on"]


def plain_text(count: int, num_prompts: int) -> list[str]:
    """A remark on prompts that are no messages, for a model that has a chat template.

    Instruct models answer such prompts as if they went on with a text, or end at once; base models may be meant to.
    """
    if not count:
        return []
    remark = (
        f"{count} of {num_prompts} prompts are plain text, to which the model's chat template is not applied; if it is an "
        'instruct model, give messages ([{"role": "user", "content": ...}]) or a system_prompt'
    )
    return [remark]


def unreadable(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A remark on prompts with characters for which the tokeniser has no token but that of the unknown.

    One that is also another special token says nothing: some tokenisers that know all bytes name one.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        return []
    found = [place for place, token_ids in enumerate(token_ids_of(prompts)) if unknown in token_ids]
    if not found:
        return []
    told = f"{len(found)} of {len(prompts)} prompts, such as {_shown(prompts[found[0]])}, have characters that the model's"
    return [f"{told} tokeniser does not know and reads as {tokenizer.unk_token}; leave them out, or take another model"]


def unseen(rows: Rows) -> list[str]:
    """A remark on columns of images, video or audio: reward functions receive them, the model does not."""
    features: Mapping[str, Any] = rows.features if is_table(rows) else {}
    found = [name for name, kind in features.items() if _holds_media(kind)]
    if not found:
        return []
    told = f"the columns {', '.join(map(repr, found))} hold" if len(found) > 1 else f"the column {found[0]!r} holds"
    return [f"{told} images, video or audio, which the model does not see: it is trained only on the text of the prompts"]


def rounded(rows: Rows) -> list[str]:
    """A remark on answers that were read as floats and are too large to have kept all digits, as JSON's large ints are."""
    if not is_table(rows):
        return []
    from datasets import Value  # noqa: PLC0415 (imported already, by whoever made the table)

    if rows.features.get("answer") != Value("float64"):
        return []
    answers = rows.with_format("numpy", columns=["answer"])["answer"][:]
    count = int((np.abs(answers) >= _ALL_WHOLE).sum())
    if not count:
        return []
    told = f"{count} of {len(rows)} answers are numbers of 2**53 or more and were read as floats, which keep 16 digits of them"
    return [f"{told}; if they have more, give the answers as text"]


def _holds_media(kind: Any) -> bool:
    """Whether a column's type is one of ``datasets`` for media, or has such in lists or records."""
    import datasets  # noqa: PLC0415 (as above)

    inner = kind.values() if isinstance(kind, Mapping) else kind if isinstance(kind, list) else [getattr(kind, "feature", None)]
    media = tuple(getattr(datasets, name) for name in _MEDIA if hasattr(datasets, name))
    return isinstance(kind, media) or any(part is not None and _holds_media(part) for part in inner)


def _key(token_ids: Sequence[int]) -> int:
    """64 bits in place of all tokens."""
    return hash(array("i", token_ids).tobytes())


def _shown(prompt: Prompt) -> str:
    text = repr(prompt.prompt)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
