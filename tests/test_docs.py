"""What the documentation says is run: each page's blocks in their order, in a folder of the page's own."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

import pytest

from benchmarks.system.command_line import CommandLine
from grpo_fast import Forecast, ops
from grpo_fast.config import Config
from grpo_fast.consistency import VLLM_SAMPLING
from grpo_fast.law.posterior import GRID
from grpo_fast.objective import OBJECTIVES, Objective
from grpo_fast.rewards.call import GIVEN
from grpo_fast.train.logged import family
from grpo_fast.trl_names import HERE, NOT_HERE
from grpo_fast.types import TrainerState
from tests.train.trainer.test_loop import NAMES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(\w+)(?: ([\w.]+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LANGUAGES = {"sh", "python", "toml", "text", "yaml"}
NOT_RUN = {"gpu", "hub", "server", "cluster"}
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
OTHER_NAMES = {
    "expandable_segments",
    "from_pretrained",
    "save_to_disk",
    "peft_config",
    "read_timeout",
    "stopped_by",
    "get_reward",
    "merge_and_unload",
    "reduce_lr_on_plateau",
    "response_template",
}
SOMETIMES = {
    *("rewards/vowels/nones", "rewards/vowels/errors", "rewards/vowels/timeouts", "rewards/restarts", "logged/loss"),
    *("completions/mean_terminated_length", "num_turns/mean", "tools/call_frequency", "tools/failure_frequency"),
    *("vespo/phi_seq_mean", "sampling/off_policy_mask/masked_fraction", "entropy_coef"),
    *("cispo_clip_ratio", "sampling/effective_sample_size", "sampling/importance_weight/masked_fraction"),
    *("sample/staleness_mean", "overlap/rollout_s", "sync/seconds", "sync/probe_kl", "sync/version", "mfu", "budget/gpu_hours"),
    *("eval_rewards/vowels/mean", "eval_vowels"),
}
"""Metrics that only some runs have, beside those that the pages' own runs log."""
FAMILIES = {family(name) for name in NAMES | SOMETIMES}
OF_THE_PAGES = {"characters"}
"""What reward functions of the pages log."""
COMMANDS = {"train", "plan", "forecast", "law", "export", "report", "doctor", "evaluate", "serve"}


@dataclass(frozen=True)
class Block:
    language: str
    word: str
    code: str

    @property
    def runs(self) -> bool:
        return self.word not in NOT_RUN and self.language in {"sh", "python", "toml"}


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in BLOCK.findall(page.read_text(encoding="utf-8"))]


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def plain_commands(code: str) -> list[list[str]]:
    """The words of a block of ``grpo-fast`` commands alone; empty where anything in it is left to a shell."""
    lines = [line for line in code.replace("\\\n", " ").splitlines() if line.strip()]
    if any(character in code.replace("\\\n", " ") for character in "<>|&;$`*?~#(){}[]!\\"):
        return []
    commands = [shlex.split(line) for line in lines]
    return commands if all(words[0] == "grpo-fast" for words in commands) else []


def metrics_of_the_page() -> set[str]:
    """The names that rows of tables in ``metrics.md`` begin with; NAME in them stands for any."""
    rows = re.findall(r"^\| (`[^|]+) \|", (DOCS / "metrics.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def explained(name: str) -> bool:
    return any(re.fullmatch(re.escape(told).replace("NAME", ".+"), name) for told in metrics_of_the_page())


def run_block(block: Block, forks: CommandLine) -> None:
    commands = plain_commands(block.code) if block.language == "sh" else []
    if block.language == "python":
        assert forks.run_code(block.code) == 0, f"{block.code}\n{forks.log()[-3000:]}"
    elif block.language == "sh" and not commands:
        run(["bash", "-euo", "pipefail", "-c", block.code], forks.home)
    for words in commands:
        assert forks.run(*words[1:]) == 0, f"{shlex.join(words)}\n{forks.log()[-3000:]}"


def run(command: list[str], home: Path) -> None:
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs for block in blocks(page))], ids=lambda p: p.stem)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, forks: CommandLine) -> None:
    forks.home = tmp_path
    for block in blocks(page):
        if not block.runs:
            continue
        if block.word:
            (tmp_path / block.word).write_text(block.code, encoding="utf-8")
        run_block(block, forks)
    files = [file.read_text(encoding="utf-8") for file in tmp_path.rglob("metrics.jsonl")]
    logged = {name for text in files for row in text.splitlines() for name in json.loads(row)}
    unknown = {name for name in logged - OF_THE_PAGES if not explained(name)}
    assert not unknown, f"metrics.md does not explain {sorted(unknown)}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("import warnings\nwarnings.warn('it has another name now', DeprecationWarning)", 1),
        ("def f(): ...\nassert f.__module__ == __name__ == '__main__'\nraise SystemExit(3)", 3),
        ("import beside\nassert beside.VALUE == 1", 0),
    ],
)
def test_code_of_a_page_runs_as_by_itself_and_can_fail(code: str, exit_code: int, tmp_path: Path, forks: CommandLine) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 1\n", encoding="utf-8")
    forks.home = tmp_path
    assert forks.run_code(code) == exit_code, forks.log()


@pytest.mark.parametrize("name", sorted(NAMES | SOMETIMES))
def test_every_metric_is_explained(name: str) -> None:
    assert explained(name)


def test_only_metrics_are_explained() -> None:
    assert not explained("loss/mean")
    names = {name.replace("NAME", "right") for name in metrics_of_the_page()}
    assert not {name for name in names if family(name) not in FAMILIES}


def test_what_a_shell_must_do_is_left_to_it() -> None:
    assert plain_commands('grpo-fast plan \\\n  --gpu "H100 80GB"\ngrpo-fast doctor\n') == [
        ["grpo-fast", "plan", "--gpu", "H100 80GB"],
        ["grpo-fast", "doctor"],
    ]
    for code in ("grpo-fast plan --json > plan.json", "grpo-fast plan $HOME", "OMP_NUM_THREADS=1 grpo-fast doctor", "ls"):
        assert plain_commands(code) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_known(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(blocks(page)), "a block that is not closed, or whose head cannot be read"
    for block in blocks(page):
        assert block.language in LANGUAGES
        assert not block.word or block.word in NOT_RUN or "." in block.word, f"what does {block.word!r} say of a block?"
        if block.language == "toml":
            Config.parse(tomllib.loads(block.code))


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*.md")], ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, heading in LINK.findall(page.read_text(encoding="utf-8")):
        there = page.parent / target if target else page
        assert there.exists(), f"{page.name} links to {target}, which is not there"
        assert not heading or heading in anchors(there), f"{page.name} links to {target}#{heading}, which {there.name} has not"


def test_every_page_is_in_the_index() -> None:
    linked = {target for target, _ in LINK.findall((DOCS / "README.md").read_text(encoding="utf-8"))}
    assert {page.name for page in PAGES} - linked == {"README.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_settings_exist(page: Path) -> None:
    known = {name.replace("_", "-") for name in Config.model_fields} | {"config", "recipe", "resume", "help"}
    for block in blocks(page):
        for line in block.code.replace("\\\n", " ").splitlines() if block.language == "sh" else ():
            words = line.split()
            if "grpo-fast" not in words:
                continue
            command = words[words.index("grpo-fast") + 1]
            assert command in COMMANDS, f"{command} is no command"
            for flag in re.findall(r" --([a-z0-9-]+)", line[line.index("grpo-fast") :]) if command == "train" else ():
                assert flag in known or flag.removeprefix("no-") in known, f"--{flag} is no flag"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_name_in_the_text_exists(page: Path) -> None:
    values = {value for field in Config.model_fields.values() for value in get_args(field.annotation)}
    known = {
        *Config.model_fields,
        *(field.name for field in fields(Forecast)),
        *OBJECTIVES,
        *ops.__all__,
        *ops.LossBatch._fields,
        *(field.name for field in fields(ops.LMHead)),
        *inspect.signature(Objective.loss_weights).parameters,
        *GIVEN,
        *(field.name for field in fields(TrainerState)),
        *OTHER_NAMES,
        *VLLM_SAMPLING,
        *({**HERE, **NOT_HERE} if page.stem == "from-trl" else ()),
    } | values
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    unknown = {
        name
        for name in re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", text)
        if name not in known | FAMILIES and not name.startswith("eval_")
    }
    assert not unknown, f"{page.name} names {sorted(unknown)}"


def test_the_number_of_shapes_is_the_laws() -> None:
    said = re.search(r"fits (\d+) curve shapes", (DOCS / "law.md").read_text(encoding="utf-8"))
    assert said is not None
    assert int(said[1]) == GRID.num_shapes


@pytest.mark.slow
def test_the_reference_is_made_from_the_docstrings(tmp_path: Path) -> None:
    make = ["make", "--dry-run", "--no-print-directory", "--old-file=env-dev", "docs"]
    made = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
    command = shlex.split(made.stdout)
    command[0] = sys.executable
    command[command.index("--output-directory") + 1] = str(tmp_path)
    run(command, tmp_path)
    text = "".join(page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html"))
    assert "Trains a policy with GRPO until a budget is spent" in text
    assert "Most probable tokens kept; 0 keeps all." in text
    assert "Learns a run's reward curve step by step" in text.replace("&#39;", "'")
