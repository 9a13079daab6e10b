"""What all laws share: the protocol is kept by each, and its checks name what they refuse."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from grpo_fast.law.forms.protocol import check_positive, checked_share


def test_a_share_is_handed_on_or_refused():
    assert checked_share(0.0) == 0.0
    assert checked_share(0.999) == 0.999
    with pytest.raises(ValueError, match=r"share=1\.0 must lie in \[0, 1\)"):
        checked_share(1.0)


@pytest.mark.parametrize("value", [0.0, -2.0, float("nan")])
def test_a_parameter_is_named_with_its_value_and_its_law(value):
    check_positive(SimpleNamespace(a=1.0, b=value), "a")
    with pytest.raises(ValueError, match=rf"b={value} must be positive in SimpleNamespace"):
        check_positive(SimpleNamespace(a=1.0, b=value), "a", "b")
