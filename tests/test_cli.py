from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cyclopts import Parameter

from grpo_fast import __version__
from grpo_fast.config import Config

Shell = Callable[..., tuple[int, str, str]]
SMALL = (  # with the model named, the recipe's own settings stay out
    "--model embedded --max-steps 2 --prompts-per-step 2 --num-generations 2 --max-completion-length 4 --dataset-size 16 "
    "--eval-size 4 --reward-workers 0"
)


def in_words(message: str) -> str:
    return " ".join(message.split())


def test_help_of_train_shows_every_setting_in_its_group(shell: Shell) -> None:
    code, out, err = shell("train --help")
    assert (code, err) == (0, "")
    shown = out.replace("\n", " ")
    for name, field in Config.model_fields.items():
        assert f"--{name.replace('_', '-')} " in shown, name
        group = next(item.group for item in field.metadata if isinstance(item, Parameter))
        assert f" {group[0].name} ─" in shown, group
    titles = ["Where the configuration comes from", "Model", "Data", "Reward", "Rollout", "Objective", "Optimiser", "Budget"]
    places = [out.index(f" {title} ─") for title in [*titles, "Forecast", "Run"]]
    assert places == sorted(places)
    assert "``" not in out, "marks of reStructuredText are for the source"


HELP = """
from grpo_fast.cli import main

for command in ("train", "plan", "law", "forecast", "report", "compare", "doctor"):
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert not end.code
"""


def test_help_waits_for_nothing_that_is_slow_to_import(imported_by: Callable[[str], set[str]]) -> None:
    assert not {"torch", "matplotlib", "scipy", "numpy"} & imported_by(HELP)


def test_commands_and_version(shell: Shell) -> None:
    _, out, _ = shell("--help")
    assert all(command in out for command in ("train", "plan", "forecast", "law", "report", "compare", "doctor"))
    assert shell("--version")[1].strip() == __version__


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --learning-rat 1", "--learning-rat. Did you mean --learning-rate"),
        ("trian", 'Did you mean "train"'),
        ("train --num-generations many", "num_generations: Input should be a valid integer"),
        ("train --num-generations 1", "num_generations: Input should be greater than or equal to 2 (got"),
        ("train --top-p 2", "top_p: Input should be less than or equal to 1 (got"),
        ("train --loss-type ppo", "loss_type: Input should be 'grpo', 'dr_grpo'"),
        ("train --loss-type cispo", "loss_type='cispo' needs epsilon_high"),
        ("train --warmup-steps 9 --max-steps 3", "warmup_steps=9 exceeds max_steps=3"),
        ("train --recipe embeded", "no recipe 'embeded'; did you mean 'embedded'?"),
        ("train --config none.toml", "cannot read the configuration none.toml: No such file or directory"),
        ("train --resume none", "there is no run in none (it has no config.toml); give the output_dir of a run"),
        ("train --use-peft true", "'true' belongs to no option: a switch takes no value; write --NAME, or --no-NAME"),
        ("train --seed 1 two words", "'two', 'words' belong to no option; quote a value that has spaces in it"),
        (
            "train --reward-range 0,1",
            "--reward-range requires 2 positional arguments. Only got 1. Separate values by spaces",
        ),
        ("train --reward-weights 1,2", "(got '1,2'); separate several values by spaces"),
        ("train --max-wall-hours 30m", "(got '30m'); give a plain number of hours"),
        ("train --loss-type GRPO", "(got 'GRPO'); did you mean 'grpo'?"),
        ("train --reward-funcs accuracy,format", "unknown reward 'accuracy,format'; give several names separately"),
        ("train --reward-funcs mine.py", "unknown reward 'mine.py'; a function of that file is 'mine:FUNCTION'"),
        ("train --model ./none", "cannot load model './none': there is no such directory"),
        ("train --recipe embedded --revision v1", "revision='v1' with model='embedded': only hub models have revisions"),
        ("train --resume none --recipe embedded", "--resume uses the run's own configuration; leave out --recipe and --config"),
        ("train --resume none --config some.toml", "--resume uses the run's own configuration"),
        (
            "train --resume none --output-dir other",
            "--resume none with --output-dir other: a run is resumed in its own directory; leave --output-dir out",
        ),
        ("train --resume none --output-dir ./none", "there is no run in none"),
        ("train --model nowhere/[at]/all", "cannot load model 'nowhere/[at]/all'"),
        ("train --reward-funcs acuracy --max-completion-length 8", "unknown reward 'acuracy'; did you mean 'accuracy'"),
        (
            "train --output-dir= --model embedded",
            "output_dir='' names nothing; give a name (a shell variable may be unset)",
        ),
        ("report none", "none"),
    ],
)
def test_a_mistake_is_one_message_without_a_traceback(line: str, message: str, shell: Shell) -> None:
    code, out, err = shell(line)
    assert code == 1
    assert out == ""
    assert message in in_words(err)
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 5


def test_a_wrong_key_in_a_file_is_told(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("learning_rte = 1e-3\n", encoding="utf-8")
    code, _, err = shell("train --config mine.toml")
    assert code == 1
    assert "unknown configuration key 'learning_rte'; did you mean 'learning_rate'?" in in_words(err)
    (tmp_path / "mine.toml").write_text("learning_rate = \n", encoding="utf-8")
    assert "mine.toml is not valid TOML" in shell("train --config mine.toml")[2]
    (tmp_path / "mine.toml").write_text("num_generations = 1\n", encoding="utf-8")
    assert "num_generations: Input should be greater than or equal to 2 (got 1)" in shell("train --config mine.toml")[2]


PLAN = "plan --recipe embedded --prompts-per-step 4 --num-generations 4 --dataset-size 64 --eval-size 8 --reward-workers 0"


def test_a_plan_takes_the_settings_of_train(shell: Shell, tmp_path: Path) -> None:
    code, out, err = shell(
        f"{PLAN} --max-steps 40 --start-reward 0.2 --seconds-per-step 90 --price-per-gpu-hour 4 --plot p.png"
    )
    assert (code, err) == (0, "")
    words = in_words(out)
    assert "start reward 0.2 (given)" in words
    assert "the budget ends at step 40; each prompt is seen 2.5 times" in words
    assert re.search(r"wall-clock time 1 min 30 s (1 h 00 min|59 min 59 s)", words), "the median of a sample of runs"
    assert re.search(r"money 0\.10* 4(\.00)? 3\.", words), "of a step and of the run"
    assert in_words(out).endswith("wrote p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "mine.toml").write_text("max_steps = 30\n", encoding="utf-8")
    _, out, _ = shell(f"{PLAN} --config mine.toml --json")
    assert json.loads(out)["budget"]["max_steps"] == 30
    assert json.loads(out)["unknown"] == ["start_reward", "seconds_per_step"]


def test_a_plan_without_a_model(shell: Shell) -> None:
    code, out, err = shell("plan --model-size 7 --prompt-tokens 90 --data-size 7000")
    assert (code, err) == (0, "")
    assert "a model of 7 B parameters" in out
    code, out, _ = shell("plan --model-size 7 --prompt-tokens 90 --data-size 7000 --json", "--gpu", "H100 80GB HBM3")
    found = json.loads(out)
    assert found["known"]["peak_flops"] == 989.4e12
    assert sum(found["outcomes"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("plan --model nowhere/at/all", "cannot load model 'nowhere/at/all'"),
        ("plan --recipe embedded --dataset arithmetics", "did you mean 'arithmetic'?"),
        ("plan --recipe embedded --learning-rat 1", "--learning-rat. Did you mean --learning-rate"),
        ("plan --recipe embedded --probe 8 --start-reward 0.1", "probe measures the start reward"),
        ("plan --recipe embedded --device cpu --max-wall-hours 2", "max_wall_hours=2 cannot be turned into steps"),
        ("plan --recipe embedded --forecast-prior none.json", "none.json"),
        ("plan --recipe embedded --start-reward 7", "reward=7.0 at the start is outside reward_range=(0.0, 1.0)"),
        ("law fit --output mine.json", "name at least one run"),
        ("law fit none.csv --output mine.json", "none.csv does not exist"),
    ],
)
def test_mistakes_in_a_plan_are_told(line: str, message: str, shell: Shell) -> None:
    code, out, err = shell(line)
    assert (code, out) == (1, "")
    assert message in in_words(err)
    assert "Traceback" not in err


def test_a_prior_of_ones_own_is_fitted_and_used(shell: Shell, tmp_path: Path) -> None:
    for seed in range(3):
        x = [step / 60 for step in range(1, 61)]
        rows = [f"{step},{0.1 + 0.8 * min(1.0, at / 0.3) + 0.001 * ((step * 7 + seed) % 5)}" for step, at in enumerate(x, 1)]
        (tmp_path / f"{seed}.csv").write_text("\n".join(["step,reward", *rows]), encoding="utf-8")
    code, out, err = shell("law fit 0.csv 1.csv 2.csv --output mine.json --plot mine.png")
    assert (code, err) == (0, "")
    assert all(
        words in in_words(out) for words in ("0.csv alone from 0.1", "by more than 0.6", "20% of a run", "wrote mine.json")
    )
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = shell("law fit 0.csv 1.csv 2.csv --output again.json --json")
    assert json.loads(out)["num_sources"] == 3
    assert (tmp_path / "again.json").read_text() == (tmp_path / "mine.json").read_text()
    ends = []
    for prior in ("", " --prior mine.json"):
        code, out, err = shell(f"forecast 0.csv --max-steps 600 --json{prior}")
        assert (code, err) == (0, "")
        ends.append(json.loads(out)["forecast"]["median"])
    assert ends[0] != ends[1]
    planned = [shell(f"{PLAN} --json{flag}")[1] for flag in ("", " --forecast-prior mine.json")]
    assert json.loads(planned[1])["prior"].endswith("mine.json")
    assert json.loads(planned[0])["outcomes"] != json.loads(planned[1])["outcomes"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of the embedded model, by the installed command."""
    home = tmp_path_factory.mktemp("trained")
    command = [str(Path(sys.executable).with_name("grpo-fast")), "train", *SMALL.split(), "--output-dir", "run"]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "max_steps=2 is reached: 2 steps are done." in done.stdout
    return home


@pytest.mark.slow
def test_a_crash_in_native_code_says_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "crash.py").write_text(
        "import signal\n\n\ndef score(completions, **columns):\n    signal.raise_signal(signal.SIGSEGV)\n", encoding="utf-8"
    )
    program = str(Path(sys.executable).with_name("grpo-fast"))
    command = [program, "train", *SMALL.split(), "--reward-funcs", "crash:score", "--output-dir", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in done.stderr
    assert f'File "{tmp_path / "crash.py"}", line 5 in score' in done.stderr


def test_json_that_nobody_reads_ends_a_command_without_a_word(tmp_path: Path) -> None:
    """As in ``| true``: it said "Broken pipe", as if a file were broken."""
    rows = [f"{step},{0.5 + step / 100}" for step in range(1, 13)]
    (tmp_path / "log.csv").write_text("\n".join(["step,reward", *rows]), encoding="utf-8")
    command = [sys.executable, "-m", "grpo_fast", "forecast", "log.csv", "--max-steps", "50", "--json"]
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=tmp_path, stdout=written, stderr=subprocess.PIPE, text=True, check=False)
    os.close(written)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_name_that_the_output_cannot_show_is_no_error(encoding: str, tmp_path: Path) -> None:
    """As under ``LC_ALL=C``, or of a file whose name is not UTF-8: a whole run ended with an error about a codec."""
    rows = [f"{step},{0.5 + step / 1000 + step % 7 / 50}" for step in range(1, 61)]
    (tmp_path / "log.csv").write_text("\n".join(["step,reward", *rows]), encoding="utf-8")
    command = [sys.executable, "-m", "grpo_fast", "law", "fit", "log.csv", "--output", b"\xc3\xa9\xff.json"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    shown = {"ascii": b"\\xe9", "utf-8": "\xe9".encode()}[encoding]
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"wrote " + shown + b"\\udcff.json\n")


@pytest.mark.slow
def test_training_leaves_a_run_with_its_report(trained: Path) -> None:
    rows = (trained / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["step"] for row in rows][-2:] == [1, 2]
    assert (trained / "run" / "report.html").stat().st_size > 1000
    assert json.loads((trained / "run" / "summary.json").read_text(encoding="utf-8"))["stopped_by"] == "max_steps"


@pytest.mark.slow
def test_a_run_goes_on_where_its_output_is_no_longer_read(tmp_path: Path) -> None:
    """As behind ``| head``: it ended without a checkpoint or a word."""
    program = str(Path(sys.executable).with_name("grpo-fast"))
    command = [program, "train", *SMALL.split(), "--output-dir", "run"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("grpo-fast: embedded learns arithmetic")
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 0, err
    assert "BrokenPipeError: nobody reads the standard output any more" in in_words(err)
    assert "; the run continues without it" in in_words(err)
    assert json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["step"] == 2
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
def test_a_run_that_moved_goes_on_where_it_is(trained: Path, shell: Shell) -> None:
    moved = trained / "moved"
    shutil.copytree(trained / "run", moved)
    code, out, err = shell(f"train --resume {moved} --max-steps 3")
    use = json.loads((moved / "summary.json").read_text(encoding="utf-8"))["use"]
    assert f"the model to use: {moved / use['checkpoint']} ({use['by']} " in in_words(out)
    assert (code, out.count("max_steps=3 is reached: 3 steps are done.")) == (0, 2), err
    assert json.loads((moved / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"] == 3
    assert in_words(out).endswith(f"wrote {moved / 'report.html'}")
    code, _, err = shell(f"train --resume {moved} --seed 5")
    assert (code, "a resumed run cannot change seed (0 -> 5)" in in_words(err)) == (1, True)


@pytest.mark.slow
def test_a_run_is_not_written_over_by_accident(trained: Path, shell: Shell) -> None:
    code, _, err = shell(f"train {SMALL} --output-dir {trained / 'run'}")
    assert code == 1
    assert "already holds a run" in in_words(err)
    assert "--overwrite" in err


@pytest.mark.slow
def test_report_of_a_run(trained: Path, shell: Shell) -> None:
    (trained / "run" / "report.html").unlink(missing_ok=True)
    code, out, _ = shell(f"report {trained / 'run'}")
    assert code == 0
    assert (trained / "run" / "report.html").exists()
    assert out.startswith("wrote ")


def test_modules_of_the_current_folder_can_be_named(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reward_of_this_folder.py").write_text("def score(wanted):\n    return []\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])  # as the installed command has it
    asks = f"train {SMALL} --reward-funcs reward_of_this_folder:score --output-dir run"
    code, _, err = shell(asks)
    assert (code, "'score' needs a dataset column 'wanted'" in in_words(err)) == (1, True), err
    assert sys.path[-1] == str(tmp_path)
    assert shell(asks)[0] == 1
    assert sys.path.count(str(tmp_path)) == 1


@pytest.mark.slow
def test_a_file_of_the_current_folder_takes_no_place_of_pythons_own(tmp_path: Path) -> None:
    (tmp_path / "profile.py").write_text("raise RuntimeError('not of Python')\n", encoding="utf-8")  # torch reads Python's
    program = str(Path(sys.executable).with_name("grpo-fast"))
    done = subprocess.run([program, "doctor"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_deleted_folder_hinders_nothing_that_does_not_need_it(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert shell("--version")[:2] == (0, f"{__version__}\n")


def test_a_run_without_a_model_says_which_one_it_trains(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_reward.py").write_text("def score(completions):\n    raise KeyError('[answer]')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    rest = "--reward-funcs broken_reward:score --no-report --output-dir"
    _, unnamed, _ = shell(f"train {SMALL.removeprefix('--model embedded ')} {rest} unnamed")
    _, named, _ = shell(f"train {SMALL} {rest} named")
    told = "no model given (--model): training the small demo model in the package"
    assert (told in in_words(unnamed), told in in_words(named)) == (True, False)


def test_doctor_speaks(shell: Shell) -> None:
    code, out, _ = shell("doctor")
    assert code in {0, 1}
    assert "torch" in out


@pytest.mark.slow
def test_a_lora_run_is_exported_as_a_plain_model(shell: Shell) -> None:
    code, out, _ = shell(f"train {SMALL} --use-peft --lora-r 4 --lora-target-modules q_proj --output-dir adapted --no-report")
    assert code == 0
    assert "its adapters are merged by `grpo-fast export adapted --output DIRECTORY`" in in_words(out)
    code, out, _ = shell("export adapted --output whole")
    assert code == 0
    assert "wrote whole, merged from adapted/checkpoint-2" in out
    assert Path("whole/model.safetensors").is_file()
    code, _, err = shell("export adapted --output whole")
    assert code == 1
    assert "whole is in use; name a new or empty directory" in err
