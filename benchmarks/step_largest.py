"""The deepest Llama that fits on this GPU, with the penalty in its forms; each try in a process of its own."""

import json
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from step_case import SIZES, Case
from step_report import WIDTHS
from step_run import Plan, in_a_process

DEFAULT = ("gd", "plain", "one backward", "one backward, 8-bit")


def most_layers(fits: Callable[[int], bool], upper: int) -> int:
    """The largest number of layers that fits, between 0 and below `upper`, which is known not to; fits is monotone."""
    lower = 0
    while upper - lower > 1:
        middle = (lower + upper) // 2
        if fits(middle):
            lower = middle
        else:
            upper = middle
    return lower


def block_parameters(size: str) -> int:
    shape = SIZES[size]
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    keys = hidden * shape["num_key_value_heads"] // heads
    return 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * shape["intermediate_size"]


def upper_bound(case: Case, memory: int) -> int:
    """Layers whose weights, gradients and AdamW states alone take more than the memory."""
    return memory // (4 * WIDTHS[case.dtype] * block_parameters(case.size)) + 1


def largest(first: Case, names: Iterable[str], plan: Plan, file: Path) -> None:
    """Prints a table, and writes it to a file."""
    if first.device != "cuda":
        print("--largest: there is no GPU here, so no limit of one to look for")
        return
    # of the driver's count, without a context of this process's own
    memory = memory_of_gpu()
    print(f"\n### Layers of {first.name} that fit in {memory / 1e9:.1f} GB\n")
    print("| | layers | M parameters | peak GB | why not one more |\n|---|--:|--:|--:|---|")
    results = []
    for contestant in names:
        found = deepest(first, contestant, memory, plan.limit)
        results.append({"contestant": contestant, "memory": memory, "setting": first.as_dict(), **found})
        figures = f"{found.get('parameters', 0) / 1e6:.0f} | {found.get('peak', 0) / 1e9:.1f}"
        print(f"| {contestant} | {found['layers']} | {figures} | {found['why_not_more']} |", flush=True)
        file.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")


def memory_of_gpu() -> int:
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(said.stdout.split()[0]) << 20


def deepest(case: Case, contestant: str, memory: int, limit: float) -> dict:
    """Layers, parameters and peak of the deepest that fits, and why one more doesn't."""
    seen: dict[int, dict] = {}

    def fits(layers):
        seen[layers] = in_a_process(replace(case, layers=layers), contestant, ["peak"], 1, limit)
        return not seen[layers].get("failure")

    upper = upper_bound(case, memory)
    layers = most_layers(fits, upper)
    failure = seen.get(layers + 1, {}).get("failure", "its weights, gradients and states alone don't fit")
    return {"layers": layers, "why_not_more": failure} | seen.get(layers, {})
