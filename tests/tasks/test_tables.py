from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from grpo_fast.config import ConfigError
from grpo_fast.tasks.tables import evenly, read_directory, read_files

TABLE = Dataset.from_list([{"prompt": f"p{row}", "answer": str(row)} for row in range(6)])


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_reads_a_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        TABLE.to_parquet(path)
    else:
        TABLE.to_json(path, lines=suffix == ".jsonl")
    assert read_files({"train": path}, split="train").to_list() == TABLE.to_list()
    assert read_files({"train": path}, split="train[:2]").to_list() == TABLE.to_list()[:2]
    with pytest.raises(ConfigError, match=r"split 'test' of .*Should be one of \['train'\]"):
        read_files({"train": path}, split="test")


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_cells_of_a_text_table_are_what_stands_there(tmp_path: Path, suffix: str, separator: str) -> None:
    path = tmp_path / f"data{suffix}"
    rows = [("prompt", "answer", "level"), ('"Which\n""one""?"', "007", "1.50"), ("NA", "", "null"), ("1e3", "True", "-0")]
    path.write_text("".join(separator.join(row) + "\n" for row in rows), encoding="utf-8")
    assert read_files({"train": path}, split="train").to_list() == [
        {"prompt": 'Which\n"one"?', "answer": "007", "level": "1.50"},
        {"prompt": "NA", "answer": "", "level": "null"},
        {"prompt": "1e3", "answer": "True", "level": "-0"},
    ]
    path.write_text("prompt\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"data{suffix}: .*no rows"):
        read_files({"train": path}, split="train")


def test_a_file_that_changes_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    for text in ("one", "two"):
        path.write_text(f'{{"prompt": "{text}"}}\n', encoding="utf-8")
        assert read_files({"train": path}, split="train")["prompt"][:] == [text]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "broken.jsonl",
            '\n{"prompt": "a\u2028"}\n{oops\n',
            r"broken.jsonl: JSON parse error in line 3: .* \(character 2\)",
        ),
        ("bom.jsonl", '\ufeff{"prompt": "a"}\n{oops\n', "bom.jsonl: JSON parse error in line 2: "),
        ("array.json", '[{"prompt": "a"},\n {"prompt"', "array.json: JSON parse error in line 2: "),
        (
            "large.jsonl",
            '{"prompt": "a", "answer": "7"}\n{"prompt": "b", "answer": -123456789012345678901234567890}\n',
            r"the number -1234567890123456789... has more than 64 bits; write it as text, in quotes \(line 2\)",
        ),
        ("twice.csv", "prompt,answer,answer\na,b,c\n", "twice.csv: it has the column 'answer' twice; rename one"),
        ("semicolon.csv", "prompt;answer\na;b\n", r"'prompt;answer', separates columns by ';'; write it with commas"),
        ("tab.csv", "prompt\tanswer\na\tb\n", r"separates columns by '\\t'; write it a \.tsv file, or with commas"),
        ("comma.tsv", "prompt,answer\na,b\n", "'prompt,answer', separates columns by ','; write it with tabs"),
        ("broken.parquet", "no parquet", "broken.parquet: .*Parquet"),
        ("empty.jsonl", "", "empty.jsonl is empty"),
        ("blank.jsonl", "\n\n", "blank.jsonl: it has no rows"),
        ("list.json", "[]", "list.json"),
        ("data.txt", "a", r"data.txt is none of .parquet, .jsonl, .json, .csv, .tsv"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_files({"train": path}, split="train")


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl", "data.json"])
@pytest.mark.parametrize("in_directory", [False, True])
def test_text_in_another_encoding_is_told_before_a_row_is_read(tmp_path: Path, name: str, in_directory: bool) -> None:
    file = tmp_path / name.replace("data", "train")
    text = "prompt,answer\nd\u00e9j\u00e0,1\n" if name.endswith("csv") else '{"prompt": "d\u00e9j\u00e0", "answer": "1"}\n'
    for encoding in ("latin-1", "utf-16"):
        file.write_bytes(text.encode(encoding))
        with pytest.raises(ConfigError, match=r"it is not in UTF-8 .*; save it in that encoding"):
            read_directory(tmp_path, name=None, split="train") if in_directory else read_files({"train": file}, split="train")
    file.write_text(text, encoding="utf-8")
    (row,) = read_directory(tmp_path, name=None, split="train") if in_directory else read_files({"train": file}, split="train")
    assert row == {"prompt": "d\u00e9j\u00e0", "answer": "1"}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no dataset file .*nothing.jsonl"):
        read_files({"train": tmp_path / "nothing.jsonl"}, split="train")


def test_reads_directories_of_files_and_saved_ones(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    TABLE.to_parquet(tmp_path / "files" / "train.parquet")
    TABLE.select([0]).to_parquet(tmp_path / "files" / "test.parquet")
    TABLE.save_to_disk(tmp_path / "saved")
    DatasetDict(train=TABLE, test=TABLE.select([0])).save_to_disk(tmp_path / "splits")
    for name in ("files", "saved", "splits"):
        assert read_directory(tmp_path / name, name=None, split="train").to_list() == TABLE.to_list()
    for name in ("files", "splits"):
        assert len(read_directory(tmp_path / name, name=None, split="test")) == 1
    for name in ("files", "saved", "splits"):
        with pytest.raises(ConfigError, match=f"split 'dev' of the directory .*{name}: .*(dev|train)"):
            read_directory(tmp_path / name, name=None, split="dev")


def test_cells_of_text_tables_in_a_directory_are_what_stands_there(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("prompt,answer\na,007\nNA,\n", encoding="utf-8")
    (tmp_path / "README.md").write_text("Mine.\n", encoding="utf-8")
    expected = [{"prompt": "a", "answer": "007"}, {"prompt": "NA", "answer": ""}]
    assert read_directory(tmp_path, name=None, split="train").to_list() == expected


def test_files_of_a_directory_with_unlike_columns_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "answer": 1}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="its files differ in their columns; give all the same, or name one file"):
        read_directory(tmp_path, name=None, split="train")


def test_a_directory_without_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read split 'train' of the directory"):
        read_directory(tmp_path, name=None, split="train")
    TABLE.select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(ConfigError, match="none: it seems to have no rows"):
        read_directory(tmp_path / "none", name=None, split="train")


def test_a_table_without_rows_is_named(tmp_path: Path) -> None:
    TABLE.select([]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match=r"train.parquet: it has no rows"):
        read_files({"train": tmp_path / "train.parquet"}, split="train")
    DatasetDict(train=TABLE).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"there is no split 'train\[:0\]'; it has train"):
        read_directory(tmp_path / "saved", name=None, split="train[:0]")


def test_progress_bars_are_as_they_were(tmp_path: Path) -> None:
    TABLE.to_json(tmp_path / "data.jsonl")
    before = are_progress_bars_disabled()
    try:
        for switch, disabled in ((disable_progress_bars, True), (enable_progress_bars, False)):
            switch()
            read_files({"train": tmp_path / "data.jsonl"}, split="train")
            assert are_progress_bars_disabled() is disabled
    finally:
        (disable_progress_bars if before else enable_progress_bars)()


def test_rows_are_taken_evenly() -> None:
    assert list(evenly(6, 3)) == [0, 2, 4]
    assert list(evenly(6, 6)) == list(evenly(6, 100)) == list(range(6))
