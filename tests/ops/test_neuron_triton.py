"""The Triton kernels over tokens: interpreted, and compiled ahead of time for GPUs that need not be there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

TESTS = [Path(__file__).parent / f"test_{name}.py" for name in ("neuron_attribution", "neuron_penalty")]


def test_under_the_interpreter():
    # the choice is made when triton is imported, so it takes a process of its own
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *map(str, TESTS)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def compile_for(capability, kernel, pointers, constants, warps):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    integers = dict.fromkeys(kernel.arg_names, "i32")
    signature = integers | pointers | dict.fromkeys(constants, "constexpr")
    # as at a launch with addresses and sizes that are multiples of 16, the sizes below 2^31
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name] != "constexpr" and not kernel.params[i].do_not_specialize
    }
    return triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"enable_fp_fusion": False, "num_warps": warps},
    )


def check(compiled, tmp_path):
    assert "fma.rn.f32" not in compiled.asm["ptx"], "a fused multiply-add rounds once where the formula rounds twice"
    assert "ftz" not in compiled.asm["ptx"], "subnormals count"
    assert not re.search(r"\b(atom|red)\.", compiled.asm["ptx"])
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    (registers,), (stack,), (local,) = (re.findall(rf"{name}:(\d+)", usage) for name in ("REG", "STACK", "LOCAL"))
    assert (stack, local) == ("0", "0"), f"spilled with {registers} registers: {usage}"


GPUS = pytest.mark.parametrize("capability", [80, 90])


@GPUS
@pytest.mark.parametrize("extremes", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attribution_compiles(capability, extremes, masked, tmp_path):
    from ssiuu_fast.kernels.neuron_attribution import BLOCKS, LANES, attribution_kernel

    pointers = {"hidden": "*bf16", "gradient": "*bf16", "sums_out": "*fp64"}
    outs = dict.fromkeys(("largest_out", "smallest_out"), "*fp32")
    absent = {} if extremes else dict.fromkeys(outs)
    if masked:
        pointers["mask"] = "*u8"
    else:
        absent["mask"] = None
    for block in BLOCKS:
        constants = absent | {"EXTREMES": extremes, "LANES": LANES, "BLOCK": block.neurons}
        compiled = compile_for(capability, attribution_kernel, outs | pointers, constants, block.warps)
        check(compiled, tmp_path)
        # whatever is read goes to shared memory in 16 bytes a thread, ahead of its use
        assert compiled.asm["ptx"].count(", 0x10,") >= 4


@GPUS
def test_combine_compiles(capability, tmp_path):
    from ssiuu_fast.kernels.neuron_attribution import combine_kernel

    names = ("largest_parts", "smallest_parts", "largest_out", "smallest_out", "sums_out")
    pointers = dict.fromkeys(names, "*fp32") | {"sum_parts": "*fp64"}
    check(compile_for(capability, combine_kernel, pointers, {"BLOCK": 256}, 4), tmp_path)


@GPUS
@pytest.mark.parametrize("one_sided", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_terms_compile(capability, one_sided, first, tmp_path):
    from ssiuu_fast.kernels.neuron_penalty import terms_kernel

    single, double = ("reference", "weight", "attribution_out", "factor_out"), ("sums", "partial_penalty")
    pointers = dict.fromkeys(single, "*fp32") | dict.fromkeys(double, "*fp64") | {"partial_negative": "*i64"}
    constants = {"LIMIT": torch.finfo(torch.float32).max, "ONE_SIDED": one_sided, "BLOCK": 512}
    if first:
        constants["reference"] = None
    check(compile_for(capability, terms_kernel, pointers, constants, 4), tmp_path)


@GPUS
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_injection_compiles(capability, dtype, tmp_path):
    from ssiuu_fast.kernels.neuron_penalty import inject_kernel

    pointers = {"gradient": f"*{dtype}", "factors": "*fp32", "mask": "*u8"}
    compiled = compile_for(capability, inject_kernel, pointers, {"TOKENS": 32, "NEURONS": 256}, 8)
    check(compiled, tmp_path)
    assert "st.global.v4.b32" in compiled.asm["ptx"]
