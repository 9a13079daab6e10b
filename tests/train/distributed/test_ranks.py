"""What several ranks make of runs, held against one process that runs the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.system.command_line import CommandLine
from tests.train.distributed.launches import CASES, RESUMED, ROUNDED, SHARDED, SHORT, Launch, cases, trace, uncounted, without
from tests.train.distributed.rank_program import play


@pytest.fixture(scope="module")
def models(tiny_model: Path, wide_model: Path) -> tuple[Path, Path]:
    return tiny_model, wide_model


@pytest.fixture(scope="module")
def launches(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, forks: CommandLine) -> dict[int, Launch]:
    """Two ranks; then four, which also go on with a sharded run that the two began."""
    two, four = (tmp_path_factory.mktemp(f"ranks-{count}") for count in (2, 4))
    first = Launch(2, models, two, leave_out="resumed", forks=forks)
    for name in (*RESUMED, ROUNDED):
        shutil.copytree(two / f"begun {name}", four / f"resumed {name}")
    return {2: first, 4: Launch(4, models, four, leave_out="begun", forks=forks)}


@pytest.fixture(params=[2, 4])
def launch(request: pytest.FixtureRequest, launches: dict[int, Launch]) -> Launch:
    return launches[request.param]


@pytest.fixture(scope="module")
def alone(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same runs in one process."""
    directory = tmp_path_factory.mktemp("alone")
    made = cases(models, directory)
    return {name: play(made[name]) | {"trace": trace(directory / name)} for name in (*CASES, *SHORT)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *(f"{more['fsdp']} {case}" for case, more in SHARDED.items())])
def test_any_number_of_ranks_makes_the_run_of_one_process(name: str, launch: Launch, alone: dict[str, Any]) -> None:
    case = name.rsplit(maxsplit=1)[-1]
    expected = alone[case]
    found = trace(launch.directory / name)
    assert [row["step"] for row in found] == [row["step"] for row in expected["trace"]]
    # completions that are the same have a KL that differs by its rounding: an advantage of 0 then, or one of 1e-9
    unsure = ("flops", "tokens/trained", "tokens/dropped") if case == "rloo" else uncounted(case)
    for row, true in zip(without(found, unsure), without(expected["trace"], unsure), strict=True):
        assert row == pytest.approx(true, rel=1e-5, abs=1e-6, nan_ok=True)
        assert row.get("reward") == true.get("reward"), "other completions were sampled"
        assert row.get("num_tokens") == true.get("num_tokens")
    for rank, findings in enumerate(launch.found):
        told = findings[name]
        assert told["error"] is None
        error = torch.tensor(told["weights"]) - torch.tensor(expected["weights"])
        assert error.abs().max() < 1e-6
        assert told["weights"] == launch.found[0][name]["weights"], "ranks hold different weights"
        assert told["is_main_process"] == (rank == 0)
        assert [step for step, *_ in told["steps"]] == [step for step, *_ in expected["steps"]]
        parts = {case: 1, f"hybrid_shard {case}": 2}.get(name, len(launch.found))
        assert told["numbers held"] == pytest.approx(len(expected["weights"]) / parts, rel=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("name", RESUMED)
def test_a_sharded_checkpoint_is_gone_on_with_by_any_number_of_ranks(
    name: str,
    launches: dict[int, Launch],
    alone: dict[str, Any],
    models: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    halfway = launches[4].directory / f"resumed {name}"
    begun, resumed = (launches[count].found[0][f"{half} {name}"] for count, half in ((2, "begun"), (4, "resumed")))
    assert ([step for step, *_ in begun["steps"]], [step for step, *_ in resumed["steps"]]) == ([1, 2], [3, 4])
    assert {path.name for path in (halfway / "checkpoint-4/optimizer").iterdir()} >= {"__0_0.distcp", "__3_0.distcp"}
    if name == "adapters":
        base = AutoModelForCausalLM.from_pretrained(models[0])
        model: Any = peft.PeftModel.from_pretrained(base, halfway / "checkpoint-4").base_model.model
        assert not (halfway / "checkpoint-4/model.safetensors").exists()
    else:
        model = AutoModelForCausalLM.from_pretrained(halfway / "checkpoint-4")
    assert torch.cat([p.detach().flatten() for p in model.parameters()]).tolist() == resumed["weights"]

    shutil.copytree(halfway, tmp_path / f"resumed {name}")
    last = play(cases(models, tmp_path)[f"resumed {name}"], resume=True)
    assert [step for step, *_ in last["steps"]] == [5, 6]
    assert (torch.tensor(last["weights"]) - torch.tensor(alone[name]["weights"])).abs().max() < 1e-6
    traces = (without(rows, uncounted(name)) for rows in (trace(tmp_path / f"resumed {name}"), alone[name]["trace"]))
    for row, true in zip(*traces, strict=True):
        assert row == pytest.approx(true, rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.slow
def test_bfloat16_weights_and_moments_come_back_bit_by_bit_to_any_number_of_ranks(
    launches: dict[int, Launch], models: tuple[Path, Path], tmp_path: Path
) -> None:
    saved = {half: launches[count].found for count, half in ((2, "begun"), (4, "resumed"))}
    begun, resumed = ([rank[f"{half} {ROUNDED}"] for rank in saved[half]] for half in ("begun", "resumed"))
    assert [rank["error"] for rank in begun + resumed] == [None] * 6
    assert [step for step, *_ in begun[0]["steps"] + resumed[0]["steps"]] == [1, 2, 3, 4]
    kinds = {(name.rsplit(maxsplit=1)[-1], found.split()[0]) for name, found in begun[0]["at last"].items()}
    assert {("weight", "torch.bfloat16"), ("exp_avg", "torch.float32"), ("exp_avg_sq", "torch.float32")} <= kinds
    assert begun[0]["at first"] != begun[0]["at last"], "nothing was trained"
    for rank in resumed:
        assert rank["at first"] == begun[0]["at last"]
        assert rank["at last"] == resumed[0]["at last"] != begun[0]["at last"]
    for count, half, steps in ((2, "begun", [3, 4]), (4, "resumed", [5, 6])):
        shutil.copytree(launches[count].directory / f"{half} {ROUNDED}", tmp_path / f"{half} {ROUNDED}")
        values = cases(models, tmp_path)[f"{half} {ROUNDED}"]
        alone = play(values, resume=True, until=steps[-1])
        assert [step for step, *_ in alone["steps"]] == steps
        assert alone["at first"] == saved[half][0][f"{half} {ROUNDED}"]["at last"]


@pytest.mark.slow
def test_the_runs_are_telling(alone: dict[str, Any]) -> None:
    rows = alone["whole"]["trace"][1:]
    assert len({row["loss"] for row in rows}) == len(rows)
    assert any(row["clip_ratio/region_mean"] > 0 for row in rows)
    assert any(0 < row["frac_reward_zero_std"] < 1 for row in [*rows, *alone["gspo"]["trace"]]), "some groups are left out"


@pytest.mark.slow
def test_a_reward_that_fails_on_one_rank_ends_all_with_a_checkpoint(launch: Launch) -> None:
    for told in launch.found:
        assert told["failing"]["error"] == launch.found[0]["failing"]["error"]
        assert told["failing"]["error"].startswith("RewardError: reward function 'failing' ")
        assert "no such answer" in told["failing"]["error"]
    assert (launch.directory / "failing" / "checkpoint-0" / "state.json").is_file()


@pytest.mark.slow
def test_a_run_that_ends_without_any_reward_is_a_failure_to_all_ranks(launch: Launch) -> None:
    for told in launch.found:
        assert told["unrewarded"]["error"].startswith("NoRewardError: reward function 'unrewarded' gave None or NaN")
    assert (launch.directory / "unrewarded" / "checkpoint-2" / "state.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_in_bfloat16_ranks_make_the_first_step_of_one_process_to_its_rounding(
    name: str, launch: Launch, alone: dict[str, Any]
) -> None:
    [first, true] = (rows[0] for rows in (trace(launch.directory / name), alone[name]["trace"]))
    assert first["step"] == true["step"] == 1
    assert first["reward"] == true["reward"]
    assert first["loss"] == pytest.approx(true["loss"], abs=1e-2)
    assert first["grad_norm"] == pytest.approx(true["grad_norm"], rel=5e-2)
    for told in launch.found:
        assert told[name]["error"] is None
        assert told[name]["weights"] == launch.found[0][name]["weights"], "ranks hold different weights"
        kept = {found.split()[0] for weight, found in told[name]["at last"].items() if weight.endswith(" weight")}
        assert kept == {"torch.bfloat16" if name == "short" else "torch.float32"}


@pytest.mark.slow
def test_optimizers_do_to_shards_what_they_do_to_whole_weights(launch: Launch) -> None:
    for told in launch.found:
        assert told["optimizers"]["stochastic"] == 0.0
        assert told["optimizers"]["offloaded"] < 1e-6
        assert (told["optimizers"]["stochastic tensors"], told["optimizers"]["offloaded tensors"]) == (9, 12)


@pytest.mark.slow
def test_a_head_is_gathered_once_an_iteration_or_never(launch: Launch) -> None:
    for told in launch.found:
        assert told["traffic"]["False"] == [2, 2], "gathers and reduce-scatters of its size in two iterations"
        assert told["traffic"]["True"] == [0, 0]
        assert min(told["traffic"]["False others"], told["traffic"]["True others"]) > 20, "several micro-batches, by layer"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "adapters", "quantised"])
def test_an_engine_reads_shards_a_layer_at_a_time_and_no_rank_hangs_where_it_fails(name: str, launch: Launch) -> None:
    for rank, findings in enumerate(launch.found):
        told = findings["streamed"][name]
        assert told["synced"] == told["again"] == told["after"] == "1.0"
        assert told["arrived"] == (told["names"] if rank == 0 else []), "in order, bit for bit in the engine's type"
        assert 0 < told["most"] <= told["largest unit"], "bytes of whole weights that live at once"
        assert told["left"] == 0
        assert "phase 'send': the wire broke (attempt 2 of 2); nothing was sampled" in told["broken"]
        assert told["saved"]
        if name == "whole":
            assert "the weight sync hung in its phase 'send'" in told["hung"]
            assert "weights were requested after the gather on rank 0 had ended" in told["refusal"]


@pytest.mark.slow
def test_what_ranks_tell_each_other(launch: Launch) -> None:
    size = len(launch.found)
    told = [found["exchanges"] for found in launch.found]
    assert all(one["gathered"] == [f"rank {rank}" for rank in range(size)] for one in told)
    assert all(one["beside"] for one in told)
    assert [one["once"] for one in told] == [True] + [False] * (size - 1)
    for number, count in enumerate((0, 1, 7)):
        edges = [one["shares"][number] for one in told]
        assert [first for first, _ in edges] == [0, *(last for _, last in edges[:-1])]
        assert edges[-1][1] == count
        assert max(last - first for first, last in edges) - min(last - first for first, last in edges) <= 1
    for one in told:
        assert one["summed"][0] == [[sum(range(1, size + 1))] * 2] * 3
        assert one["summed"][1:] == [[size, size], [[0, 2 * size], [size, 3 * size]], [{2: 256, 4: 260}[size]]]
        assert one["gather raised"] == ["rank 1 stumbled", "it must"]
        assert "once raised" not in one, "rank 0 does not stumble"


@pytest.mark.slow
def test_a_head_in_parts_gives_loss_and_gradients_of_the_whole_one(launch: Launch) -> None:
    for told in launch.found:
        *errors, smallest = told["head"]
        assert max(errors) < 1e-12
        assert smallest > 1e-4
        assert max(told["gathered rows"]) < 1e-12
