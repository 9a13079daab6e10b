"""Generated pages: each marker of the README gets its own table, the numbers are those of the results, nothing is old."""

from __future__ import annotations

import json

import pytest

from benchmarks import tables

FIGURE = [0.1234, 0.1, 0.2]


def test_the_page_of_results_is_what_the_results_say():
    for path, text in tables.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: run `python benchmarks/tables.py`"


def test_the_table_of_the_ops_is_that_of_the_promised_case():
    rows = tables.ops_table().splitlines()
    assert "T = 2,048, H = 576, V = 49,152, float32" in rows[0]
    assert any(row.startswith("| grpo_fast |") for row in rows)
    assert any(row.startswith("| trl chunked_logprob (1.16") for row in rows)
    medians = [row.split("|")[3] for row in rows[2:]]
    assert medians == sorted(medians, key=float)


@pytest.fixture
def results(tmp_path, monkeypatch):
    names = ["last value", "grpo_fast.law"]
    level = {"error": {name: [FIGURE] * 4 for name in names}, "inside90": {names[1]: [[0.9, 0.8, 0.95]] * 4}}
    ratio = [
        {"seen": seen, "best": "last value", "ratio": [0.8, 0.7, 0.9], "chosen": [0.75, 0.6, 0.9]}
        for seen in (0.2, 0.4, 0.6, 0.8)
    ]
    rules = ["grpo_fast.law, 0.9", "patience 20%", "patience 10%", "fixed 40%", "fixed 80%"]
    rules += ["plug-in, exponential + R0", "hindsight oracle"]
    stops = {name: dict.fromkeys(("saved", "lost", "false", "bad"), FIGURE) for name in rules}
    found = {
        "about": {"curves": 204, "repositories": 27},
        "law": "grpo_fast.law",
        "stop_rule": rules[0],
        "forecasts": {group: {"level": level} for group in ("all", "learning")},
        "against_best": {"error": {"all": ratio, "learning": ratio}},
        "limits": {"told": [0.2] * 4, "mixture": [{"error": 0.1, "weights": {}, "elsewhere": 0.15}] * 4},
        "stopping": {"all": stops},
    }
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "published.json").write_text(json.dumps(found), encoding="utf-8")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tmp_path


def test_each_marker_gets_its_own_table(results, monkeypatch):
    readme = results / "README.md"
    readme.write_text(
        "a\n<!-- law table: x -->\nold\n<!-- table end -->\nb\n<!-- stop table: x -->\nold\n<!-- table end -->\nc\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(tables, "README", readme)
    text = tables.rendered_readme()
    assert "old" not in text
    assert text.index("27 repositories") < text.index("\nb\n") < text.index("hindsight oracle")
    assert "| 0.123 (last value) |" in text
    assert "| 0.80 (0.70 to 0.90) |" in text
    assert "| patience 20% | 12% | 0.1234 | 12.3% | 12.3% |" in text
    for line in text.splitlines():
        if line.startswith("| error"):
            assert line.count("|") == 5
