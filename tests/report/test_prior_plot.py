from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_fast.report.prior_plot import plot_prior, write_prior_plot

FITTED: dict[str, Any] = {
    "num_used": 3,
    "rises": {"falls": {"before": 0.25, "after": 0.125}, "by more than 0.6": {"before": 0.75, "after": 0.875}},
    "shapes": {"none": {"before": 0.5, "after": 0.25}, "straight": {"before": 0.5, "after": 0.75}},
}


def test_both_priors_are_shown_side_by_side() -> None:
    rises, shapes = plot_prior(FITTED).axes
    assert [axis.get_title(loc="left") for axis in (rises, shapes)] == ["How far a run rises", "In which shape"]
    assert [bar.get_width() for bar in rises.patches] == [0.75, 0.25, 0.875, 0.125]
    assert [bar.get_width() for bar in shapes.patches] == [0.5, 0.5, 0.75, 0.25]
    assert [label.get_text() for label in rises.get_yticklabels()] == ["by more than 0.6", "falls"]
    assert [text.get_text() for text in shapes.get_legend().get_texts()] == ["before", "after 3 runs"]


def test_a_png_file_is_written(tmp_path: Path) -> None:
    write_prior_plot(tmp_path / "prior.png", FITTED)
    assert (tmp_path / "prior.png").read_bytes().startswith(b"\x89PNG")


def test_a_full_disk_is_told_with_the_file() -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_prior_plot(Path("/dev/full"), FITTED)
