"""The tests of the ops on the device that is not there: each function once, with its first parameters.

    TRITON_INTERPRET=1 python -m tests.cuda_on_host.ops LIBRARY

What only a GPU refuses, as types that its kernels do not take, or tensors of the host among its own, fails here too. Those that
compile, and PyTorch's own check of an operator, are left out: they take no tensor that stands in for another.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cuda_on_host.torch_device import Device, load

LEFT_OUT = "not compile and not well_registered and not another_device"


class FirstOfEach:
    """Chooses the tests."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Those that run kernels."""
        functions: dict[tuple[Path, str], pytest.Item] = {}
        for item in items:
            if "device" in getattr(item, "fixturenames", ()):
                functions.setdefault((item.path, item.name.partition("[")[0]), item)
        items[:] = functions.values()


if __name__ == "__main__":
    load(Path(sys.argv[1]))
    Device()
    ARGUMENTS = ["tests/ops", "-q", "--tb=short", "-p", "no:cacheprovider", "-m", "not slow and not gpu", "-k", LEFT_OUT]
    sys.exit(pytest.main([*ARGUMENTS, "-W", "default"], plugins=[FirstOfEach()]))
