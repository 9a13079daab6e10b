from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorboard")

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from grpo_fast.integrations.logs.event_files import has_events, read_events


def write_events(folder: Path, points: list[tuple[int, str, float]], *, as_tensors: bool = False, begun: float = 1e9) -> Path:
    """Event files as trainers write them; newer writers put scalars into tensors."""
    writer = EventFileWriter(str(folder), filename_suffix=f".{begun:.0f}")
    for number, (step, tag, value) in enumerate(points):
        content = {"tensor": make_tensor_proto(np.float32(value))} if as_tensors else {"simple_value": value}
        entry = Summary(value=[Summary.Value(tag=tag, **content)])
        writer.add_event(Event(step=step, wall_time=begun + number, summary=entry))
    writer.close()
    return folder


@pytest.mark.parametrize("as_tensors", [False, True])
def test_rows_in_the_order_of_writing(tmp_path: Path, as_tensors: bool) -> None:
    points = [
        (1, "train/reward", 0.25),
        (1, "train/loss", 3.0),
        (2, "train/reward", 0.5),
        (2, "step", 9.0),
        (1, "train/reward", 0.75),
    ]
    write_events(tmp_path, points, as_tensors=as_tensors)
    expected = [
        {"step": 1.0, "train/reward": 0.25, "train/loss": 3.0},
        {"step": 2.0, "train/reward": 0.5},
        {"step": 1.0, "train/reward": 0.75},
    ]
    assert read_events(tmp_path) == expected
    assert read_events(next(tmp_path.iterdir())) == expected
    assert has_events(tmp_path)
    assert not has_events(tmp_path.parent)


def test_what_is_no_scalar_is_left_out(tmp_path: Path) -> None:
    writer = EventFileWriter(str(tmp_path))
    content = make_tensor_proto(np.zeros(3, dtype=np.float32))
    writer.add_event(Event(step=1, wall_time=1.0, summary=Summary(value=[Summary.Value(tag="histogram", tensor=content)])))
    writer.close()
    assert read_events(tmp_path) == []
