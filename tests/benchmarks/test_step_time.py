"""The median step of the embedded task costs at most half of TRL's, in turns on this machine, and takes less memory."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="TRL is not installed; the comparison needs it")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # TRL's own
def test_the_median_step_costs_at_most_half_of_trls() -> None:
    from benchmarks.system.step_time import measure

    # over a run: TRL's steps cost the same all through it, ours most while nearly every group is alive, as in the first third
    result = measure(15, stride=8)
    print(result)
    assert result["paired_ratio_median"] >= 2.0  # of steps that met the same state of the machine


@pytest.mark.slow
def test_memory_stays_below_trls_as_steps_of_other_lengths_come() -> None:
    from benchmarks.system.step_time import peak_memory

    assert peak_memory("grpo_fast", "embedded", 12) < 1100  # MiB; TRL 1.16.0 has 1,190 after 3 steps


@pytest.mark.slow
def test_more_steps_than_a_run_has_are_refused_before_the_first() -> None:
    from benchmarks.system.step_time import measure

    with pytest.raises(ValueError, match="41 steps of TRL's, 4 of ours to each, are more than the run's 160; take fewer"):
        measure(41, stride=4)
