from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest


def test_names_are_imported_when_they_are_first_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "cupboard"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from grpo_fast.lazy import lazy_names\n"
        '__getattr__, __dir__, __all__ = lazy_names(__name__, {"plate": "kitchen", "Cup": "kitchen"})\n',
        encoding="utf-8",
    )
    (package / "kitchen.py").write_text("class Cup: ...\nplate = [Cup()]\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    cupboard = importlib.import_module("cupboard")
    try:
        assert dir(cupboard) == cupboard.__all__ == ["Cup", "plate"]
        assert "cupboard.kitchen" not in sys.modules
        assert cupboard.plate is sys.modules["cupboard.kitchen"].plate
        assert vars(cupboard)["plate"] is cupboard.plate
        assert "Cup" not in vars(cupboard)
        with pytest.raises(AttributeError, match="module 'cupboard' has no attribute 'saucer'"):
            _ = cupboard.saucer
    finally:
        for name in ("cupboard", "cupboard.kitchen"):
            sys.modules.pop(name, None)
