"""What does the compiler give the Triton kernel of weight gradients: registers, spills and shared memory?

    python benchmarks/weight_gradient_resources.py [--architectures 80 90 100 120]

Compiles every form ahead of time, with the tiles that a launch there would take; needs no device. Prints a row a form,
and fails if one spills registers.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from typing import NamedTuple

import torch
import triton
from kernel_resources import Kernel, parse
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssiuu_fast.kernels import weight_gradient

ARCHITECTURES = (80, 90, 100, 120)
FORMS = ("weighted", "both", "penalty")
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Compiled(NamedTuple):
    """parse's row of the assembler's report, and what it doesn't say."""

    kernel: Kernel
    tile: weight_gradient.Tile
    shared_bytes: int
    ptx: str


def compile_form(form: str, dtype: torch.dtype, aligned: bool, architecture: int, wide: bool = False) -> Compiled:
    """One form of the kernel, adding to what is there; wide: outs and references in float32 beside 16-bit operands."""
    tile = weight_gradient.tile_of(dtype, aligned, divmod(architecture, 10))
    operand = TYPES[dtype]
    stored = "fp32" if wide else operand
    pointers = dict.fromkeys(("gradient", "input"), f"*{operand}") | dict.fromkeys(("weights",), "*fp32")
    constants = {
        "ADD_PLAIN": True,
        "ADD_WEIGHTED": True,
        "LIMIT": 3e38,
        "ONE_SIDED": False,
        "UPDATE": True,
        "FIRST": False,
        "OUTPUTS": tile.outputs,
        "INPUTS": tile.inputs,
        "TOKENS": tile.tokens,
        "GROUP": weight_gradient._GROUP,
        "PARTS": tile.inputs // weight_gradient._PART,
        "WIDEN": False,
    }
    given = {
        "plain_out": f"*{stored}",
        "weighted_out": f"*{stored}",
        "parameter": f"*{operand}",
        "reference": f"*{stored}",
        "penalty_weight": "*fp32",
        "partial_sums": "*fp64",
        "partial_counts": "*i64",
    }
    names = {
        "weighted": ("weighted_out",),
        "both": ("weighted_out", "plain_out"),
        "penalty": [name for name in given if name != "weighted_out"],
    }[form]
    for name, pointer in given.items():
        if name in names:
            pointers[name] = pointer
        else:
            constants[name] = None
    if aligned:
        inner = ("gradient_output_stride", "input_input_stride", "plain_input_stride", "weighted_input_stride")
        constants |= dict.fromkeys(inner, 1)
    kernel = weight_gradient.weight_gradient_kernel
    signature = dict.fromkeys(kernel.arg_names, "i32") | {"gradient_scale": "fp32"} | pointers
    signature |= dict.fromkeys(constants, "constexpr")
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if aligned and signature[name] not in ("constexpr", "fp32") and not kernel.params[i].do_not_specialize
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=divisible)
    options = {"enable_fp_fusion": False, "num_warps": tile.warps, "num_stages": tile.stages}
    report = io.StringIO()
    # the assembler only reports what it assembles
    with tempfile.TemporaryDirectory() as cache, triton.knobs.nvidia.scope(), triton.knobs.cache.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.cache.dir = cache
        with contextlib.redirect_stdout(report):
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    memory = ("aligned" if aligned else "odd") + (", fp32 out" if wide else "")
    (row,) = parse(report.getvalue(), operand, architecture)
    return Compiled(row._replace(name=f"{form}, {memory}"), tile, compiled.metadata.shared, compiled.asm["ptx"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES)
    args = parser.parse_args()
    print(f"{'dtype':5} {'form':27}  sm  tile (outputs, inputs, tokens)  warps  registers  spilled B  shared B")
    spilled = 0
    for dtype in TYPES:
        for form in FORMS:
            for aligned in (True, False):
                for wide in (False, True) if dtype != torch.float32 else (False,):
                    for architecture in args.architectures:
                        kernel, tile, shared, _ = compile_form(form, dtype, aligned, architecture, wide)
                        line = f"{kernel.file:5} {kernel.name:27} {architecture:3}  {str(tuple(tile[:3])):31}"
                        line += f" {tile.warps:5} {kernel.registers:10} {kernel.spilled_bytes:10} {shared:9}"
                        print(line, flush=True)
                        spilled += kernel.spilled_bytes > 0
    print(f"triton {triton.__version__}")
    if spilled:
        print(f"{spilled} forms spill registers", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
