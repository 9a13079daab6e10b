"""Groups of one update."""

from __future__ import annotations

import math

import pytest

from grpo_fast.types import Group
from tests.train.step.bench import MakeGroup


@pytest.fixture
def groups(make_group: MakeGroup) -> list[Group]:
    """Two live groups, between them one without variance, and one completion without a reward."""
    return [make_group(0, [1.0, 0.0, 0.5, 0.0]), make_group(1, [1.0] * 4), make_group(2, [0.0, math.nan, 1.0, 0.25])]
