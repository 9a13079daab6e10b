"""``python -m grpo_fast`` is ``grpo-fast``, for where scripts are not on the path: ``torchrun -m grpo_fast train``."""

from grpo_fast.cli import main

if __name__ == "__main__":
    main()
