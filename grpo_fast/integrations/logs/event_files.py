"""TensorBoard's event files as rows of numbers. The one door to tensorboard's readers."""

from __future__ import annotations

from pathlib import Path


def has_events(path: Path) -> bool:
    """Whether event files lie in this directory itself."""
    return any(path.glob("*.tfevents.*"))


def read_events(path: Path) -> list[dict[str, float]]:
    """Rows of a directory of event files, or of one file, in the order in which they were written.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """
    from tensorboard.backend.event_processing import event_accumulator  # noqa: PLC0415 (an extra)
    from tensorboard.util.tensor_util import make_ndarray  # noqa: PLC0415

    events = event_accumulator.EventAccumulator(
        str(path), size_guidance={"scalars": 0, "tensors": 0}, purge_orphaned_data=False
    )
    events.Reload()
    tags = events.Tags()
    points = [(point.wall_time, point.step, tag, point.value) for tag in tags["scalars"] for point in events.Scalars(tag)]
    for tag in tags["tensors"]:
        for point in events.Tensors(tag):
            value = make_ndarray(point.tensor_proto)
            if value.size == 1 and value.dtype.kind in "fiu":
                points.append((point.wall_time, point.step, tag, float(value.item())))
    rows: list[dict[str, float]] = []
    for _, step, tag, value in sorted(points, key=lambda point: point[0]):
        if tag == "step":
            continue
        if not rows or rows[-1]["step"] != step or tag in rows[-1]:
            rows.append({"step": float(step)})
        rows[-1][tag] = float(value)
    return rows
