"""The directory that vLLM reads a policy's configuration and tokeniser from: what is the same has the same name.

vLLM keeps what it compiled for a model under a hash that the directory's name goes into. Under a random one each start would
compile anew, and leave one more copy under ``~/.cache/vllm``. So the name is a hash of what the directory holds, in one place
of the user's; processes that start at once share it by locks, and the last that needs it removes it. Nothing here imports vLLM.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_fast.rollout.engine import RolloutError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextlib.contextmanager
def model_directory(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[Path]:
    """Everything but the weights that vLLM reads of a model, on disk for as long as the context lasts.

    Args:
        model: the policy.
        tokenizer: its tokeniser.

    Raises:
        RolloutError: the place of such directories is another user's.
    """
    home = _home()
    for left in home.iterdir():  # by processes that were killed; the kernel has let go of their locks
        _remove_unheld(left)
    with tempfile.TemporaryDirectory(prefix="grpo_fast-", dir=home.parent) as scratch:
        written = Path(scratch) / "model"
        config = model.config
        values = config.to_dict() | {"architectures": config.architectures or [type(model).__name__]}
        values.pop("quantization_config", None)  # weights in four bits are sent as what those stand for
        type(config).from_dict(values).save_pretrained(written)
        tokenizer.save_pretrained(written)
        place = home / _digest(written)
        handle = _hold(written, place)
    try:
        yield place
    finally:
        os.close(handle)
        _remove_unheld(place)


def _home() -> Path:
    """A directory that nobody else can write to: vLLM takes what lies there for the policy's."""
    home = Path(tempfile.gettempdir()) / f"grpo_fast-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    found = home.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise RolloutError(f"{home} is not a private directory of this user; remove it, or set TMPDIR to another directory")
    return home


def _digest(directory: Path) -> str:
    """Of names and contents of all files."""
    found = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        content = path.read_bytes()
        found.update(f"{path.relative_to(directory)}\0{len(content)}\0".encode())
        found.update(content)
    return found.hexdigest()[:32]


def _hold(written: Path, place: Path) -> int:
    """Brings a directory to its place, unless its like is there, and locks what is there; the lock goes with the handle."""
    own = _open(written)
    fcntl.flock(own, fcntl.LOCK_SH)
    while True:
        try:
            written.rename(place)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                os.close(own)
                raise
        else:
            return own
        with contextlib.suppress(FileNotFoundError):
            other = _open(place)
            fcntl.flock(other, fcntl.LOCK_SH)
            if _is_at(other, place):
                os.close(own)
                return other
            os.close(other)  # it was removed while this waited


def _remove_unheld(place: Path) -> None:
    """Removes a directory that no process has locked; anything else is left."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, BlockingIOError):
        handle = _open(place)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, place):
                shutil.rmtree(place, ignore_errors=True)
        finally:
            os.close(handle)


def _open(directory: Path) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY)


def _is_at(handle: int, place: Path) -> bool:
    """Whether what is open is what stands there now."""
    try:
        return os.path.samestat(os.fstat(handle), place.stat())
    except FileNotFoundError:
        return False
