"""Generated pages: each marker gets its own figures, the figures are those of the results, nothing is old."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import tables

FIGURE = [0.1234, 0.1, 0.2]


def test_the_page_of_results_is_what_the_results_say():
    for path, text in tables.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: run `python benchmarks/tables.py`"


def test_everything_that_is_made_stands_on_one_page():
    text = "".join(path.read_text(encoding="utf-8") for path in (tables.README, *tables.DOCS.glob("*.md")))
    assert sorted(re.findall(r"<!-- generated: (\w+)", text)) == sorted(tables.MADE)
    assert text.count("<!-- end -->") == len(tables.MADE)


def test_the_first_figures_are_those_of_the_tables():
    said = " ".join(tables.highlights().split())
    ops = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:]] for row in tables.ops_table().splitlines()}
    for name in ("grpo_fast", "torch eager"):
        assert f"{ops[name][0]} and {ops[name][2]}" in said
    steps = [[cell.strip() for cell in row.split("|")] for row in tables.step_table().splitlines()[2:]]
    for row in steps:
        if "Zen 5" in row[1]:
            assert f"{row[2]} against TRL's {row[3]} ({row[4]})" in said
        else:
            place = row[1].split(", ", 1)[1].removesuffix(", quiet")
            assert re.search(rf"{re.escape(row[4])}[^,]* on an {re.escape(place)}", said)
    saved, lost, over = (cell.strip() for cell in tables.stop_table().splitlines()[2].split("|")[2:5])
    assert f"saves {saved} of the compute at a mean loss of {lost} reward" in said
    assert f"{over} of the runs lose more than 0.02" in said
    stops = [row.split("|") for row in tables.early_stop_table().splitlines()[2:]]
    assert f"at least {min(float(row[4]) / float(row[5]) for row in stops):.1%} of the final accuracy" in said


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
    stops = {name: dict.fromkeys(("saved", "lost", "false", "bad"), FIGURE) for name in rules} | {"curves": 163}
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


def test_each_marker_gets_its_own_table(results):
    page = results / "page.md"
    page.write_text(
        "a\n<!-- generated: law_table, by x -->\nold\n<!-- end -->\nb\n<!-- generated: stop_table -->\nold\n<!-- end -->\nc\n",
        encoding="utf-8",
    )
    text = tables.rendered(page)
    assert "old" not in text
    assert text.index("27 repositories") < text.index("\nb\n") < text.index("hindsight oracle")
    assert "| rule, on 163 curves |" in text
    assert "| 0.123 (last value) |" in text
    assert "| 0.80 (0.70 to 0.90) |" in text
    assert "| patience 20% | 12% | 0.1234 | 12.3% | 12.3% |" in text
    for line in text.splitlines():
        if line.startswith("| error"):
            assert line.count("|") == 5


def test_a_marker_of_an_unknown_name_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- generated: lore_table -->\n<!-- end -->\n", encoding="utf-8")
    with pytest.raises(KeyError, match="lore_table"):
        tables.rendered(page)
