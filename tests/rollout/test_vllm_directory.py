from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from grpo_fast.assets import embedded_model_dir
from grpo_fast.rollout import RolloutError
from grpo_fast.rollout.vllm_directory import model_directory


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded_model_dir())


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path / f"grpo_fast-{os.getuid()}"
    assert [path.name for path in tmp_path.iterdir() if path.name != f"grpo_fast-{os.getuid()}"] == []


def test_what_is_the_same_has_the_same_name_and_nothing_stays(model: Any, tokenizer: Any, home: Path) -> None:
    with model_directory(model, tokenizer) as first:
        names = {path.name for path in first.iterdir()}
        assert {"config.json", "tokenizer_config.json"} <= names
        assert not {name for name in names if name.endswith((".safetensors", ".bin"))}, "weights come by another way"
        with model_directory(model, tokenizer) as beside:
            assert beside == first
        assert {path.name for path in first.iterdir()} == names, "who came later took away what is in use"
    assert list(home.iterdir()) == []
    with model_directory(model, tokenizer) as again:
        assert again == first


def test_another_model_has_another_name(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with model_directory(model, tokenizer) as first:
        monkeypatch.setattr(model.config, "rms_norm_eps", 3e-5)
        with model_directory(model, tokenizer) as other:
            assert other != first
            assert AutoModelForCausalLM.from_config(model.config).config.rms_norm_eps == 3e-5


def test_what_a_killed_process_left_is_not_taken_for_whole(model: Any, tokenizer: Any, home: Path) -> None:
    with model_directory(model, tokenizer) as place:
        whole = {path.name for path in place.iterdir()}
    place.mkdir()
    (place / "config.json").write_text("{}", encoding="utf-8")
    (home / "of another model").mkdir()
    with model_directory(model, tokenizer) as again:
        assert again == place
        assert {path.name for path in again.iterdir()} == whole
        assert [path.name for path in home.iterdir()] == [place.name]


def test_what_is_no_directory_is_left_alone(model: Any, tokenizer: Any, home: Path, tmp_path: Path) -> None:
    home.mkdir(mode=0o700)
    (home / "note").touch()
    (home / "link").symlink_to(home / "nowhere")
    with model_directory(model, tokenizer) as place:
        assert place.is_dir()
    assert {path.name for path in home.iterdir()} == {"note", "link"}


def test_many_at_once_have_it_whole_as_long_as_they_need_it(model: Any, tokenizer: Any, home: Path) -> None:
    def use(_: int) -> list[bytes]:
        with model_directory(model, tokenizer) as place:
            return [path.read_bytes() for path in sorted(place.iterdir()) for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(use, range(64)))
    assert found == [found[0]] * 64
    assert list(home.iterdir()) == []


def test_a_place_that_others_can_write_to_is_refused(model: Any, tokenizer: Any, home: Path) -> None:
    home.mkdir()
    home.chmod(0o777)
    with (
        pytest.raises(RolloutError, match=r"is not a private directory of this user; remove it, or .* TMPDIR"),
        model_directory(model, tokenizer),
    ):
        pass
    home.rmdir()
    home.symlink_to(home.parent)
    with pytest.raises(RolloutError, match="is not a private directory of this user"), model_directory(model, tokenizer):
        pass


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_vllm_takes_two_starts_for_the_same_model(model: Any, tokenizer: Any) -> None:
    """By this hash it finds again what it compiled."""
    from vllm.engine.arg_utils import EngineArgs

    found = set()
    for _ in range(2):
        with model_directory(model, tokenizer) as place:
            given = EngineArgs(
                model=str(place), dtype="float32", load_format="dummy", weight_transfer_config={"backend": "ipc"}
            )
            found.add(given.create_engine_config().compute_hash())
    assert len(found) == 1
