from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from grpo_fast.rollout.held_directory import HeldDirectory

KILLED = """
import os
from grpo_fast.rollout.held_directory import HeldDirectory
held = HeldDirectory()
print(held.path, flush=True)
os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_is_removed_and_what_others_use_is_not(tmp_path: Path) -> None:
    early = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, check=False)
    os.utime(early.stdout.strip(), (2**31, 2**31))  # made before the clock was set back
    found = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, check=False)
    left, fresh, used = Path(found.stdout.strip()), HeldDirectory(), HeldDirectory()
    assert (found.returncode, left.is_dir()) == (-9, True)
    (used.path / "file").write_bytes(b"1")
    link = left.with_name(f"{left.name}-link")
    link.symlink_to(tmp_path)
    try:
        for directory in (left, used.path):
            os.utime(directory, (1, 1))
        os.utime(link, (1, 1), follow_symlinks=False)
        os.utime(tmp_path, (1, 1))
        last = HeldDirectory()
        assert not left.exists()
        assert not Path(early.stdout.strip()).exists()
        assert fresh.path.exists()
        assert (used.path / "file").exists()
        assert tmp_path.exists(), "a link leads to what is not ours"
    finally:
        link.unlink()
    for held in (fresh, used, last, last):
        held.close()
        assert not held.path.exists()
