from __future__ import annotations

from pathlib import Path

import pytest

from grpo_fast.config_file import ConfigError, read_toml


def test_invalid_toml_names_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("seed = 1\nbeta = = 2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML: .*line 2"):
        read_toml(file)


def test_a_file_of_an_editor_that_marks_utf_8_is_read(tmp_path: Path) -> None:
    file = tmp_path / "marked.toml"
    file.write_bytes(b"\xef\xbb\xbfsystem_prompt = 'na\xc3\xafve'\n")
    assert read_toml(file) == {"system_prompt": "na\u00efve"}


def test_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=r"model\.safetensors is not valid TOML"):
        read_toml(file)
