"""The command ``grpo-fast``, also as ``python -m grpo_fast``, for where scripts are not on the path."""

import signal
import sys
from types import FrameType


def main() -> None:
    """Runs the command line; Ctrl-C ends it with one message, also while libraries are imported.

    Some libraries swallow an interrupt during their import and then raise an error of their own, so an error that follows an
    interrupt counts as the interrupt.
    """
    interrupts: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have had it ignored
        signal.signal(signal.SIGINT, interrupt)
    try:
        from grpo_fast.cli import main as command  # noqa: PLC0415 (to import it takes long enough for Ctrl-C)

        command()
    except (Exception, KeyboardInterrupt):
        if not interrupts:
            raise
        print("error: stopped at once", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
