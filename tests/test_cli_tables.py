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


def test_the_path_of_a_file_is_never_broken(capsys: pytest.CaptureFixture[str]) -> None:
    print_written(Console(width=20), Path("a/very/long/path/to/a/file.png"))
    assert capsys.readouterr().out == "wrote a/very/long/path/to/a/file.png\n"
