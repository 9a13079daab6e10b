"""The door to the extension: it says what is wrong, and the library asks torch for nothing that another version lacks."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo_fast.ops import native

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_what_is_not_built_is_said_with_the_way_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from grpo_fast.ops import native;"
        "native.library = lambda: Path(sys.argv[1]) if sys.argv[1:] else None;"
        "print(native.obstacle(torch.ones(1)));"
        "assert native.status().startswith('missing: ' + native.SLOWER);"
        "native.call('pack_sequences', torch.ones(1), 1)"
    )
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"no library")
    for arguments, reason in (
        ([], "is not built"),
        ([str(broken)], f"_native.so does not load under torch {torch.__version__}"),
    ):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
        assert reason in done.stdout
        assert native.BUILD in done.stdout
        assert f"RuntimeError: pack_sequences: {done.stdout.strip()}" in done.stderr


@pytest.mark.usefixtures("native_library")
def test_the_state_is_one_line_for_people() -> None:
    assert re.fullmatch(r"built: .* for the CPU( and CUDA)?", native.status())


@pytest.mark.usefixtures("native_library")
def test_an_obstacle_is_named_by_device() -> None:
    assert native.obstacle(torch.ones(1)) is None
    assert "no kernels for meta" in str(native.obstacle(torch.ones(1, device="meta")))


@pytest.mark.usefixtures("native_library")
def test_every_op_is_registered_with_its_schema() -> None:
    text = (ROOT / "csrc" / "bindings.cpp").read_text(encoding="utf-8")
    schemas = "\n".join(re.findall(r'"([^"]*)"', text))
    names = re.findall(r"\b([a-z]\w+)\(", schemas)
    assert tuple(names) == native.OPS
    needs_avx512 = {"decoder_layer", "few_rows_product", "draw_tokens"}
    assert {name for name in names if not native.has_kernel(name, "CPU")} in (set(), needs_avx512)


@pytest.mark.usefixtures("native_library")
def test_the_library_uses_torchs_stable_abi_alone() -> None:
    path = native.library()
    if path is None or shutil.which("nm") is None:
        pytest.skip("neither the library nor nm is beside this package")
    found = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1].split("@")[0] for line in found.splitlines()]
    assert "torch_library_impl" in symbols
    foreign = [name for name in symbols if re.search(r"c10|at[0-9]*_?Tensor|3c10|2at|5torch|^Py|^_Py", name)]
    assert not foreign
    shim = [name for name in symbols if name.startswith(("aoti_", "torch_"))]
    system = re.compile(r"^(_Z|__|_ITM_|_Unwind_|GOMP_|mem|std|free$|malloc$|log$|str|cuda|cu[A-Z]|_)")
    rest = [name for name in symbols if name not in shim and not system.match(name)]
    assert not rest, rest
