"""Progress bars of transformers and the hub: only for a terminal, and never over the live console."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Context in which no bars are drawn, unless the environment decides; afterwards they are as they were."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:  # which has priority, and a warning for who changes it
        yield
        return
    shown, hidden_by_hub = is_progress_bar_enabled(), are_progress_bars_disabled()
    disable_progress_bar()  # the hub's too
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()
        (disable_progress_bars if hidden_by_hub else enable_progress_bars)()


def bars_for_a_terminal() -> contextlib.AbstractContextManager[None]:
    """Context in which bars are drawn if standard error, where they go, is a terminal: a log would keep every state of them."""
    seen = sys.stderr is not None and sys.stderr.isatty()
    return contextlib.nullcontext() if seen else without_bars()
