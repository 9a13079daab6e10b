"""``GRPO_FAST_BUILD=none|cpu|cuda`` says which native extension is built; everything else stands in pyproject.toml.

``cpu`` and ``cuda`` need the torch that is installed (``pip install --no-build-isolation``), and give one library for all
supported versions: it uses torch's stable ABI and nothing of Python's. By default nothing is compiled.
"""

import os

from setuptools import setup

TARGETS = ("none", "cpu", "cuda")
TORCH_2_11 = "0x020b000000000000ULL"
HOST = ("weight_pack", "weight_delta", "packing", "policy_loss", "group_advantage", "decoder_layer", "draw_tokens")
SOURCES = ["csrc/bindings.cpp", *(f"csrc/cpu/{name}.cpp" for name in HOST)]
CUDA_SOURCES = ["csrc/cuda/weight_pack.cu", "csrc/cuda/weight_delta.cu"]
# Without contraction a product and a sum are rounded alike on every processor and on a GPU.
EXACT = ["-ffp-contract=off"]
# Loops may be vectorised: sums where they ask for it, and others although nobody reads what errno and traps would say.
LOOPS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", *EXACT, *LOOPS, f"-DTORCH_TARGET_VERSION={TORCH_2_11}"]
NVCC_FLAGS = ["-O3", "-std=c++20", "--fmad=false", f"-DTORCH_TARGET_VERSION={TORCH_2_11}", "-DUSE_CUDA"]


def native(target):
    """The arguments of ``setup`` that build the extension."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: PLC0415

    sanitizers = os.environ.get("GRPO_FAST_SANITIZE", "")
    extra = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-fno-wrapv", "-g", "-O1"] if sanitizers else []
    kind = CUDAExtension if target == "cuda" else CppExtension
    library = kind(
        "grpo_fast.ops._native",
        SOURCES + (CUDA_SOURCES if target == "cuda" else []),
        py_limited_api=True,
        extra_compile_args={"cxx": FLAGS + extra, "nvcc": NVCC_FLAGS},
        extra_link_args=extra[:1],
    )
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


target = os.environ.get("GRPO_FAST_BUILD", "none")
if target not in TARGETS:
    raise SystemExit(f"GRPO_FAST_BUILD={target!r}; choose one of {', '.join(TARGETS)}")
setup(**({} if target == "none" else native(target)))
