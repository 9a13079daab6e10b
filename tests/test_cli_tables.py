from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from grpo_fast.cli_tables import print_notes, print_table, print_words, print_written


def test_what_looks_like_markup_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=60)
    print_words(console, {"[bold]model": "me/[red]"})
    print_table(console, ("", "a"), [("[x]", "[/]")])
    print_notes(console, ["[at] 3"])
    print_written(console, None, Path("[a].png"), Path("b"))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["[bold]model  me/[red]", "", "      a", "[x]   [/]", "note: [at] 3", "wrote [a].png", "wrote b"]


def test_no_number_is_cut_on_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(Console(width=13), ("", "energy", "run"), [("kWh", "0.00123456", "1.07")])
    out = capsys.readouterr().out
    assert "…" not in out
    digits = "".join(line[4:6] for line in out.splitlines()).replace(" ", "")
    assert "0.00123456" in digits, out


def test_the_path_of_a_file_is_never_broken(capsys: pytest.CaptureFixture[str]) -> None:
    print_written(Console(width=20), Path("a/very/long/path/to/a/file.png"))
    assert capsys.readouterr().out == "wrote a/very/long/path/to/a/file.png\n"
