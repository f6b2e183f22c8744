"""What does the compiler give every CUDA kernel: registers, spills and shared memory? Needs nvcc, no device.

    python benchmarks/kernel_resources.py [--architectures 80 90 100 120]

Compiles each file of csrc/cuda for each architecture as the build does, prints a row a kernel and the time in all, and
fails if a kernel spills registers. "Warps" is how many of them the registers leave room for on a multiprocessor.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHITECTURES = (80, 90, 100, 120)
REGISTERS = 65_536
WARP = 32
WARPS_A_BLOCK = 8
DTYPES = ("float32", "bfloat16", "float16")
# most warps of a multiprocessor, where it isn't 64
MOST_WARPS = {120: 48}


class Kernel(NamedTuple):
    file: str
    name: str
    architecture: int
    registers: int
    spilled_bytes: int
    shared_bytes: int

    @property
    def warps(self) -> int:
        # registers are handed out in units of 8 a thread
        block = -(-self.registers // 8) * 8 * WARP * WARPS_A_BLOCK
        return min(REGISTERS // block * WARPS_A_BLOCK, MOST_WARPS.get(self.architecture, 64))


def compile_file(nvcc: str, source: Path, architecture: int) -> list[Kernel]:
    """Compile one file and read the assembler's report."""
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    flags = ["-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v", target]
    includes = [f"-I{folder}" for folder in (CSRC, CSRC / "include", CSRC / "cuda")]
    command = [nvcc, *flags, *includes, "-cubin", str(source), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return parse(done.stderr, source.name, architecture)


def parse(report: str, file: str, architecture: int) -> list[Kernel]:
    kernels = []
    for part in report.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        name = demangled(part.partition("'")[0])
        kernels.append(
            Kernel(
                file,
                name,
                architecture,
                int(registers[1]),
                int(spills[1]) + int(spills[2]),
                int(shared[1]) if shared else 0,
            )
        )
    return kernels


def demangled(symbol: str) -> str:
    """reduce_kernel<true, bfloat16> from the linker's name for it, where c++filt is there to read it."""
    if not shutil.which("c++filt"):
        return symbol
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").replace("ssiuu::", "").removeprefix("void ")
    name = re.sub(r"\(Dtype\)(\d)", lambda match: DTYPES[int(match[1])], name)
    return name.partition("(")[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES)
    args = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("nvcc isn't on PATH: it comes with the CUDA toolkit")
    start = time.perf_counter()
    kernels = [
        kernel
        for source in sorted((CSRC / "cuda").glob("*.cu"))
        for architecture in args.architectures
        for kernel in compile_file(nvcc, source, architecture)
    ]
    seconds = time.perf_counter() - start
    width = max(len(kernel.name) for kernel in kernels)
    print(f"{'file':12} {'kernel':{width}}  sm  registers  warps  spilled B  shared B")
    for kernel in sorted(kernels):
        print(
            f"{kernel.file:12} {kernel.name:{width}} {kernel.architecture:3} {kernel.registers:10} {kernel.warps:6}"
            f" {kernel.spilled_bytes:10} {kernel.shared_bytes:9}"
        )
    release = re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    print(f"nvcc {release[1]}: {len(kernels)} kernels in {seconds:.0f} s")
    spilled = [kernel for kernel in kernels if kernel.spilled_bytes]
    if spilled:
        print(f"{len(spilled)} kernels spill registers", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
