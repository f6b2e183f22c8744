"""What a run holds in memory, and what it does in a step.

With N parameters of w bytes, of which n are regularised, every number of bytes below is exact, and the activations are
counted on a dry run of the model itself (dry_run.py). docs/memory.md has the formula for a Llama-like block.

    weights              w N          in all
    AdamW states         2 w N        unlearning: both moments, in the dtype of the weights
    gradients            w N          unlearning: from the forget rows' backward to the next step
    references           4 n, 2 n or 1.016 n; of neurons 4 bytes each, by sample with several micro-batches
    g                    w n          the penalty: it becomes the gradient. With several micro-batches their sum and the
                                      one just formed, 2 w n, stand beside the gradients
    activations          what autograd keeps of one forward pass, and what a backward pass needs beside it
    optimizer            w N on a GPU (all tensors at once), 2 w of the largest parameter on a CPU
    best weights so far  w N in host memory, twice while they are renewed; on a CPU that is the same memory

The peak is the states plus the largest of the phases of a step.
"""

from dataclasses import dataclass

from ssiuu_fast.ops.blockwise8 import BLOCK
from ssiuu_fast.planning.dry_run import Workload, attribution, unlearning_step
from ssiuu_fast.planning.skeleton import Skeleton

OPTIMIZER = "optimizer"
KEEPING = "keeping the best weights"


@dataclass(frozen=True)
class Need:
    """The memory and the work of one kind of run.

    states: bytes that are there throughout. phases: the most bytes beside them, by phase of a step. kept: bytes of the
    activations that autograd keeps of one forward pass; logits: of the logits among them. gradients, sums: bytes of the
    gradients, and of Σg and g beside them, all in the phases. flops: of a step. moved: bytes that optimizer and penalty
    read and write in a step. host: bytes in host memory where that is another one.
    """

    states: dict[str, int]
    phases: dict[str, int]
    kept: int
    logits: int
    flops: int
    moved: float = 0.0
    gradients: int = 0
    sums: int = 0
    host: int = 0

    @property
    def phase(self) -> str:
        """The phase in which the peak is reached."""
        return max(self.phases, key=self.phases.get)

    @property
    def peak(self) -> int:
        return sum(self.states.values()) + self.phases[self.phase]


def attribution_need(skeleton: Skeleton, workload: Workload) -> Need:
    """One batch through frozen weights; three means a neuron are kept in fp64."""
    run = attribution(skeleton, workload)
    counts = skeleton.counts
    states = {"weights": _width(skeleton) * counts.parameters, "means": 24 * counts.neurons}
    return Need(states, run.phases, run.kept, _logits(skeleton, workload), run.flops)


def unlearning_need(
    skeleton: Skeleton,
    workload: Workload,
    *,
    grain: str | None,
    state_dtype: str | None = None,
    rows: int | None = None,
    on_cpu: bool = False,
) -> Need:
    """Unlearning by GD, with the penalty at a grain ("parameter", "neuron") or without (None).

    rows: of the forget set; neurons with several micro-batches are compared sample by sample.
    """
    run = unlearning_step(skeleton, workload, grain)
    counts, width = skeleton.counts, _width(skeleton)
    weights = width * counts.parameters
    states = {"weights": weights, "AdamW states": 2 * weights}
    if grain is not None:
        states["references"] = reference_bytes(skeleton, workload, grain, state_dtype, rows)
    phases = run.phases | {OPTIMIZER: weights + (2 * width * counts.largest if on_cpu else weights)}
    copied = width * counts.copied
    if on_cpu:
        states["best weights so far"] = copied
        phases[KEEPING] = weights + copied
    return Need(
        states=states,
        phases=phases,
        kept=run.kept,
        logits=_logits(skeleton, workload) if skeleton.head is None else 0,
        flops=run.flops,
        # AdamW reads weight, gradient and both moments and writes all but the gradient
        moved=7 * weights + (_penalty_traffic(skeleton, workload, state_dtype) if grain == "parameter" else 0),
        gradients=weights,
        sums=2 * width * sum(counts.regularized) if grain == "parameter" and workload.split else 0,
        host=0 if on_cpu else 2 * copied,
    )


def data_parallel_peak(need: Need, skeleton: Skeleton) -> int:
    """The peak on each of several GPUs that hold the whole model and share the rows; need: of one GPU's rows.

    DistributedDataParallel keeps the gradients once more, in its buckets; the penalty's g is summed in one flat buffer.
    """
    if not need.gradients:
        return need.peak
    flat = _width(skeleton) * sum(skeleton.counts.regularized) if "references" in need.states else 0
    return need.peak + need.gradients + flat


def sharded_peak(need: Need, skeleton: Skeleton, workload: Workload, gpus: int) -> int:
    """The peak on each of several GPUs that share the rows and everything of model size (FSDP2, ZeRO-3).

    What is of model size is divided. Whole are the activations, the logits, which sharded models always form, and their
    gradient, two blocks (the one at work and the next), and the embedding.
    """
    width, counts = _width(skeleton), skeleton.counts
    activations = need.kept - need.logits + 2 * _logits(skeleton, workload)
    divided = sum(need.states.values()) + need.gradients + need.sums
    return -(-divided // gpus) + activations + width * (2 * counts.block + counts.largest)


def reference_bytes(
    skeleton: Skeleton, workload: Workload, grain: str, state_dtype: str | None, rows: int | None
) -> int:
    """Bytes of the references: of parameters as `state_dtype` says, of neurons fp32."""
    if grain == "neuron":
        return 4 * skeleton.counts.neurons * ((rows or workload.batch_size) if workload.split else 1)
    if state_dtype == "8bit":
        return sum(numel + 4 * -(-numel // BLOCK) for numel in skeleton.counts.regularized)
    return _state_width(skeleton, state_dtype) * sum(skeleton.counts.regularized)


def _penalty_traffic(skeleton: Skeleton, workload: Workload, state_dtype: str | None) -> float:
    """Bytes that penalty_ reads and writes: g, φ and A^ref in; A^ref out, and g or, beside it, `.grad` in and out."""
    width = _width(skeleton)
    state = 1 + 4 / BLOCK if state_dtype == "8bit" else _state_width(skeleton, state_dtype)
    written = 2 * width if workload.split else width
    return (2 * width + 2 * state + written) * sum(skeleton.counts.regularized)


def _state_width(skeleton: Skeleton, state_dtype: str | None) -> int:
    return {None: _width(skeleton), "float32": 4, "bfloat16": 2}[state_dtype]


def _logits(skeleton: Skeleton, workload: Workload) -> int:
    return _width(skeleton) * workload.rows_at_once * workload.length * skeleton.vocabulary


def _width(skeleton: Skeleton) -> int:
    return skeleton.dtype.itemsize
