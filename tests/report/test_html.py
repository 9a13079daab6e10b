from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import escape
from PIL import Image

from grpo_fast.report import RunError, write_report
from grpo_fast.report.html import changed_settings, headline, reason, samples, tiles, use
from grpo_fast.report.plots import PICTURES
from grpo_fast.report.run import Run

MakeRun = Callable[..., Path]
INJECTION = "</pre><script>alert('x')</script><img src=http://evil.example/x.png onerror=alert(1)> {{ 7 * 7 }} & done"


class _Page(HTMLParser):
    """Tags, and every attribute that a browser would fetch from."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in {"src", "srcset", "href", "action", "data", "poster"}]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def _parsed(path: Path) -> tuple[str, _Page]:
    text, page = path.read_text(encoding="utf-8"), _Page()
    page.feed(text)
    return text, page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, run_maker: Callable[..., Path]) -> Path:
    """The report of a run that its forecast stopped."""
    return write_report(run_maker(tmp_path_factory.mktemp("runs") / "run", steps=168))


@pytest.mark.slow
def test_one_file_tells_the_run_and_needs_nothing_else(report: Path) -> None:
    assert report.name == "report.html"
    text, page = _parsed(report)
    assert page.fetched
    assert all(value.startswith("data:image/png;base64,") for value in page.fetched)
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags)
    ours = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|@import|url\(", ours)
    assert "stopped itself at step 168 of 400" in text
    assert "there is a 91.2% chance that less than 0.01 reward is left" in text
    assert "TFLOP" in text
    assert "prefers-color-scheme: dark" in text
    assert "learning_rate" in text
    assert "5.23.0" in text
    assert not list(report.parent.glob(".*"))


@pytest.mark.slow
def test_pictures_are_written_beside_it(report: Path) -> None:
    names = sorted(picture.name for picture in (report.parent / "plots").iterdir())
    assert names == ["beliefs.png", "compute.png", "forecasts.png", "health.png", "phases.png", "stop.png"]
    with Image.open(report.parent / "plots" / "phases.png") as image:
        assert image.size == (1680, 780)


def test_a_picture_that_finds_no_room_is_named_and_the_one_before_it_stays(make_run: MakeRun) -> None:
    run = make_run(steps=12)
    write_report(run)
    picture, before = run / "plots" / "phases.png", resource.getrlimit(resource.RLIMIT_FSIZE)
    content = picture.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as told:
            write_report(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert told.value.filename == str(picture)
    assert picture.read_bytes() == content


def test_what_a_model_wrote_is_text_never_markup(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_fast.report.html.pictures_of", lambda run: {"phases": PICTURES["phases"]})
    path = make_run("<b>run", steps=20, completion=INJECTION)
    with (path / "events.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "event": "warn", "message": INJECTION}) + "\n")
    text, page = _parsed(write_report(path))
    assert text.count(str(escape(INJECTION))) == 4  # three samples and the event
    assert "script" not in page.tags
    assert not page.handlers
    assert not any("evil.example" in value for value in page.fetched)
    assert "&lt;b&gt;run" in text
    assert "<b>run" not in text


def test_an_unfinished_run_has_a_report(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_fast.report.html.pictures_of", lambda run: {"health": PICTURES["health"]})
    path = make_run(steps=1, stopped_by=None, eval_steps=0)
    (path / "config.toml").unlink()
    (path / "completions.jsonl").unlink()
    text = write_report(path).read_text()
    assert "The run is unfinished: step 1 of 1" in text
    assert "There is no forecast yet" in text
    assert "No completions were kept" in text
    assert "config.toml is missing" in text


def test_the_checkpoint_to_take_is_named(make_run: MakeRun) -> None:
    path = make_run(steps=40, stopped_by="forecast")
    assert use(Run.load(path)) == ""
    summary = json.loads((path / "summary.json").read_text())
    chosen = {"checkpoint": "checkpoint-30", "step": 30, "reward": 0.75, "by": "held-out reward"}
    (path / "summary.json").write_text(json.dumps(summary | {"use": chosen}))
    told = "The model to use is checkpoint-30, the best of those saved: held-out reward 0.750."
    assert use(Run.load(path)) == told
    assert told in write_report(path).read_text()


def test_what_is_believed_of_an_unfinished_run_is_told(make_run: MakeRun) -> None:
    late = Run.load(make_run("late", steps=90, stopped_by=None))
    assert reason(late).startswith("Its forecast for the end is 0.")
    early = reason(Run.load(make_run("early", steps=20, stopped_by=None)))
    assert early.endswith("It is not identifiable yet: the rise has not begun: plateau and speed cannot be told apart.")


@pytest.mark.parametrize(
    ("stopped_by", "words"),
    [
        ("forecast", "stopped itself at step 40 of 400, at a reward of 0.17"),
        ("interrupt", "was interrupted at step 40 of 400"),
        ("collapse", "was stopped at step 40 of 400, at a reward of 0.17"),
        ("max_tokens", "because the budget max_tokens was used up"),
        (None, "is unfinished: step 40 of 400"),
    ],
)
def test_the_headline_says_how_it_ended(make_run: MakeRun, stopped_by: str | None, words: str) -> None:
    assert words in headline(Run.load(make_run(steps=40, stopped_by=stopped_by)))


def test_headlines_of_whole_and_empty_runs(make_run: MakeRun) -> None:
    assert "completed all of its 30 steps" in headline(Run.load(make_run("a", steps=30, max_steps=30, stopped_by="max_steps")))
    nothing = Run.load(make_run("b", steps=3, nan_steps=(1, 2, 3), eval_steps=0, stopped_by=None))
    assert "without a single reward" in headline(nothing)
    assert "Reward" not in {tile.label for tile in tiles(nothing)}


def test_tiles_hold_what_was_measured(make_run: MakeRun) -> None:
    run = Run.load(make_run(steps=168))
    shown = {tile.label: tile.value for tile in tiles(run)}
    assert shown["Steps"] == "168"
    assert shown["Saved"] == "58 %"
    assert shown["Model FLOPs"] == "1.08 TFLOP"
    assert shown["Device time"] == "5 min 23 s"
    assert shown["Reward"] == f"{run.final_reward:.3f}"
    free = {
        tile.label for tile in tiles(Run.load(make_run("free", steps=20, price=0.0, stopped_by="max_tokens", eval_steps=0)))
    }
    assert not {"Money", "Saved", "Held-out reward"} & free


def test_samples_are_of_the_first_middle_and_last_step_and_cut(make_run: MakeRun) -> None:
    rows = samples(Run.load(make_run(steps=20, completion="x" * 5000)))
    assert [row["step"] for row in rows] == [1] * 3 + [10] * 3 + [20] * 3
    assert rows[0]["completion"].endswith("[... 3000 more characters]")
    assert rows[1]["prompt"] == "system: Be brief.\nuser: What is 17 + 25?"
    assert rows[0]["reward"] == "0"


def test_what_reward_functions_logged_stands_beside_a_sample(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_fast.report.html.pictures_of", lambda run: {"phases": PICTURES["phases"]})
    path = make_run(steps=20)
    kept = [json.loads(line) for line in (path / "completions.jsonl").read_text().splitlines()]
    logged = {"parsed": INJECTION, "share": 1 / 3, "right": True, "missing": None}
    (path / "completions.jsonl").write_text("".join(json.dumps(row | logged) + "\n" for row in kept))
    assert samples(Run.load(path))[0]["extra"] == {"parsed": INJECTION, "share": "0.333", "right": "True"}
    text, page = _parsed(write_report(path))
    assert text.count("&middot; share <b>0.333</b>") == text.count("advantage <b>") == 9
    assert text.count(str(escape(INJECTION))) >= 9
    assert "script" not in page.tags


def test_only_changed_settings_are_told() -> None:
    told = changed_settings({"learning_rate": 1e-3, "seed": 0, "stop": ["a", "b"], "shuffle": False, "not_ours": 3})
    assert told == {"learning_rate": "0.001", "stop": "a, b", "shuffle": "no", "not_ours": "3"}


def test_no_run_no_report(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_it(report: Path, tmp_path: Path, width: int) -> None:
    assert CHROMIUM is not None
    shot = tmp_path / "shot.png"
    profile = tmp_path / "profile"
    quiet = [
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--disable-quic",
    ]
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *quiet,
        f"--user-data-dir={profile}",
        "--hide-scrollbars",
    ]
    command += [f"--window-size={width},2400", f"--screenshot={shot}", report.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(shot) as image:
        pixels = image.convert("RGB")
        assert pixels.width == width
        colors = {color for _, color in pixels.getcolors(maxcolors=1 << 24)}  # type: ignore[union-attr]
    assert (0xF4, 0xF6, 0xF8) in colors
    assert (0x1F, 0x23, 0x28) in colors
    blue = sum(abs(r - 0) < 8 and abs(g - 0x72) < 8 and abs(b - 0xB2) < 8 for r, g, b in colors)
    assert blue > 0


def test_a_place_that_cannot_be_written_is_told_before_pictures_are_drawn(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(steps=6, max_steps=6, stopped_by="max_steps")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"into \S*/inner \(\S*/file is a file\); name another directory with --output"):
        write_report(run, tmp_path / "file" / "inner")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)]
    made = subprocess.run(mount, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if made is None or made.returncode:
        pytest.skip("cannot mount a file system that is read-only here")
    try:
        with pytest.raises(RunError, match=rf"{disk}/out \(no permission for {disk}, or a read-only .* another .*--output"):
            write_report(run, disk / "out")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
