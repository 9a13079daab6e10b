"""What ranks tell each other before anything is loaded."""

from __future__ import annotations

from grpo_fast.config import Config
from grpo_fast.train.distributed import World
from grpo_fast.train.launch import launcher
from grpo_fast.train.resumable import takes_up_run


def shake_hands(config: Config, world: World, *, resume: bool) -> bool:
    """Finds out, once the ranks have met, whether they begin a run or go on with one.

    Args:
        config: of this rank.
        world: the ranks.
        resume: whether this rank was told to go on with the run.

    Returns:
        Whether the run in ``output_dir`` is gone on with: as told, or because it is to be taken up.

    Raises:
        ConfigError: the run is to be taken up, and ``config`` would make another of it.
    """
    launchers = world.gather(launcher)
    return resume or world.once(lambda: takes_up_run(config, launchers))
