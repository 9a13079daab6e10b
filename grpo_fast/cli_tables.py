"""How commands print words, tables, notes and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table


def print_json(value: Mapping[str, Any]) -> None:
    """Prints one JSON object on a line; where nobody reads it, as behind ``| head``, rich ends the command without a word."""
    Console().out(json.dumps(value, allow_nan=False), highlight=False)


def print_words(console: Console, words: Mapping[str, str]) -> None:
    """Prints words beside their names."""
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, told in words.items():
        table.add_row(f"[bold]{escape(name)}[/]", escape(told))
    console.print(table, highlight=False)


def print_table(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints an empty line, then rows of cells under their heads; on a narrow terminal words are broken, but none are cut."""
    columns = [Column(head, overflow="fold") for head in heads]
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for row in rows:
        table.add_row(*map(escape, row))
    console.print()
    console.print(table, highlight=False)


def print_notes(console: Console, notes: Sequence[str]) -> None:
    """Prints a line for each note."""
    for told in notes:
        console.print(f"[dim]note:[/] {escape(told)}", highlight=False)


def print_written(console: Console, *files: Path | None) -> None:
    """Prints which files were written; ``None`` stands for one that was not asked for."""
    for file in filter(None, files):
        console.print(f"wrote {file}", highlight=False, markup=False, soft_wrap=True)
