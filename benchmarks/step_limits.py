"""What this machine's processor and memory allow a step: matrix products at the model's shapes, and a copy.

The least time of a step is its products at the speed they have alone, plus the bytes of what is elementwise at the
speed of a copy; attention, norms, the loss and Python are left out. docs/performance.md works out the counts.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rows import now, quantiles, versions
from step_case import SIZES, Case
from step_report import STATE_BYTES, WIDTHS
from stopwatch import Stopwatch

COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}


@dataclass(frozen=True)
class Linear:
    """Linear modules of one shape, and how many a model has."""

    name: str
    out_features: int
    in_features: int
    count: int

    @property
    def parameters(self) -> int:
        return self.out_features * self.in_features * self.count


def linears_of(case: Case) -> list[Linear]:
    shape = SIZES[case.size]
    hidden, ffn = shape["hidden_size"], shape["intermediate_size"]
    layers = case.layers or shape["num_hidden_layers"]
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    if keys == hidden:
        attention = [Linear("q, k, v, o", hidden, hidden, 4 * layers)]
    else:
        attention = [Linear("q, o", hidden, hidden, 2 * layers), Linear("k, v", keys, hidden, 2 * layers)]
    mlp = [Linear("gate, up", ffn, hidden, 2 * layers), Linear("down", hidden, ffn, layers)]
    return [*attention, *mlp, Linear("head", shape["vocab_size"], hidden, 1)]


# units of linear-layer work on the forget rows beyond GD's forward, dX and dW: (products like dX, products like dW)
PRODUCTS = {
    "gd": (0, 0),
    "two backwards": (1, 1),
    "one backward": (0, 1),
    "one backward, 8-bit": (0, 1),
    "one backward, every=4": (0, 0.25),
}


def elementwise_bytes(contestant: str, width: int) -> float:
    """Bytes moved for each regularised parameter beyond those of GD; docs/performance.md."""
    state = STATE_BYTES.get(contestant, width)
    if contestant == "gd":
        return 0.0
    if contestant == "two backwards":
        # g is written, the pass reads g, φ, reference and writes g, reference, and the loss is added to it
        return width + (3 * width + 2 * state) + 3 * width
    # g is written by its product, the pass reads g, φ, reference, dW and writes reference, dW
    whole = width + 4 * width + 2 * state
    return whole / 4 if contestant.endswith("every=4") else whole


def adamw_bytes(width: int) -> int:
    """A parameter: reads weight, gradient and two states, writes weight and states; and the retain rows' gradient is
    written and added to the forget rows', which were written."""
    return 7 * width + 2 * width + 3 * width


@dataclass
class Speeds:
    """FLOP/s of each shape's three products, and bytes/s of a copy, read and written."""

    products: dict[str, tuple[float, float, float]]
    copy: float


def measure(case: Case, rounds: int) -> Speeds:
    stopwatch = Stopwatch(torch.device(case.device))
    dtype = getattr(torch, case.dtype)
    tokens = case.batch // case.micro_batches * case.length
    products = {}
    for linear in linears_of(case):
        weight = torch.randn(linear.out_features, linear.in_features, device=case.device).to(dtype)
        hidden = torch.randn(tokens, linear.in_features, device=case.device).to(dtype)
        gradient = torch.randn(tokens, linear.out_features, device=case.device).to(dtype)
        calls = (
            lambda x=hidden, w=weight: x @ w.T,
            lambda y=gradient, w=weight: y @ w,
            lambda y=gradient, x=hidden: y.T @ x,
        )
        work = 2 * tokens * linear.in_features * linear.out_features
        products[linear.name] = tuple(work / median_time(stopwatch, call, rounds) for call in calls)
    source = torch.zeros(COPIED_BYTES[case.device] // 4, device=case.device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / median_time(stopwatch, lambda: target.copy_(source), rounds)
    return Speeds(products, copy)


def median_time(stopwatch, call, rounds: int) -> float:
    stopwatch.call_time(call)
    return quantiles([stopwatch.call_time(call) for _ in range(max(3, rounds))])[1]


def least_seconds(case: Case, contestant: str, speeds: Speeds) -> tuple[float, float]:
    """Seconds of a step's products, and of its elementwise bytes."""
    of_rows = case.batch * case.length
    more_dx, more_dw = PRODUCTS[contestant]
    products = 0.0
    for linear in linears_of(case):
        forward, dx, dw = (2 * of_rows * linear.parameters / speed for speed in speeds.products[linear.name])
        # the head isn't regularised: of it the target's pass needs dX alone
        more = more_dx * dx + (more_dw * dw if linear.name != "head" else 0.0)
        products += 2 * (forward + dx + dw) + more
    width = WIDTHS[case.dtype]
    regularized = sum(linear.parameters for linear in linears_of(case) if linear.name != "head")
    shape = SIZES[case.size]
    embeddings = shape["vocab_size"] * shape["hidden_size"] * (1 if shape["tie_word_embeddings"] else 2)
    moved = adamw_bytes(width) * (regularized + embeddings)
    moved += elementwise_bytes(contestant, width) * regularized
    return products, moved / speeds.copy


def limits(case: Case, rounds: int, where: str, file: Path) -> None:
    """Prints the speeds and the least times, and writes them to a file."""
    torch.set_num_threads(case.threads)
    speeds = measure(case, rounds)
    rows = case.batch // case.micro_batches
    print(f"\n### Products of {rows} x {case.length} tokens, {case.dtype}, {case.size}\n")
    print("| linear modules | out × in | count | x Wᵀ, GFLOP/s | dY W | dYᵀ x |\n|---|--:|--:|--:|--:|--:|")
    for linear in linears_of(case):
        found = " | ".join(f"{speed / 1e9:.1f}" for speed in speeds.products[linear.name])
        print(f"| {linear.name} | {linear.out_features} × {linear.in_features} | {linear.count} | {found} |")
    print(f"\nCopy: {speeds.copy / 1e9:.2f} GB/s, read and written.\n\n### Least time of a step\n")
    print("| | products, s | elementwise, s | sum, s | × gd |\n|---|--:|--:|--:|--:|")
    least = {name: least_seconds(case, name, speeds) for name in PRODUCTS}
    for name, (products, moved) in least.items():
        whole = products + moved
        print(f"| {name} | {products:.4f} | {moved:.4f} | {whole:.4f} | {whole / sum(least['gd']):.3f} |")
    about = {"setting": case.as_dict(), "hardware": where, "versions": versions(), "timestamp": now()}
    found = about | asdict(speeds) | {"least_seconds": least}
    file.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    print(f"\nNumbers in {file.with_suffix('.json')}")
