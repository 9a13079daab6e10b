from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Shell = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("plan --plot none/p.png", "--plot none/p.png: there is no directory none; make it first"),
        ("plan --plot p.pdf", "--plot p.pdf: it must end in .png: that is what is written"),
        ("plan --plot d.png", "--plot d.png: this is a directory; name a file"),
        ("forecast log.csv --plot none/p.png", "--plot none/p.png: there is no directory none"),
        ("law fit log.csv --output none/p.json", "--output none/p.json: there is no directory none"),
        ("law fit log.csv --output p.json --plot p.jpg", "--plot p.jpg: it must end in .png"),
        ("evaluate embedded --output d.png", "--output d.png: this is a directory; name a file"),
        ("evaluate embedded --output file/answers.jsonl", "--output file/answers.jsonl: there is no directory file"),
        ("evaluate embedded --output /proc/self/fd/none/a", "there is no directory /proc/self/fd/none"),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_anything_is_read(
    line: str, told: str, shell: Shell, tmp_path: Path
) -> None:
    (tmp_path / "d.png").mkdir()
    (tmp_path / "file").touch()
    code, out, err = shell(line)
    assert (code, out) == (1, "")
    assert told in " ".join(err.split())


def test_a_place_without_permission_is_told(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda place, mode: False)  # root may write everywhere
    code, _, err = shell("plan --plot p.png")
    assert code == 1
    assert "--plot p.png: this cannot be written (no permission, or a read-only file system); name another place" in err


def test_a_file_is_written_over_and_beside_others(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,reward\n" + "\n".join(f"{step},0.{step}" for step in range(1, 9)), encoding="utf-8")
    (tmp_path / "p.PNG").touch()
    code, _, err = shell("forecast log.csv --max-steps 20 --plot p.PNG")
    assert (code, err) == (0, "")
    assert (tmp_path / "p.PNG").read_bytes().startswith(b"\x89PNG")
