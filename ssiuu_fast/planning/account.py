"""What a run holds in memory, and what it does in a step.

With N parameters of w bytes, of which n are regularised, every number of bytes below is exact, and the activations are
counted on a dry run of the model itself (dry_run.py). docs/memory.md has the formula for a Llama-like block.

    weights              w N          in all
    AdamW states         2 w N        unlearning: both moments, in the dtype of the weights
    gradients            w N          unlearning: from the forget rows' backward to the next step
    references           4 n, 2 n or 1.016 n; of neurons 4 bytes each, by sample with several micro-batches; offloaded
                         4 slots of the largest, or of 33.6 MB (or all) if that is more, and all of them in pinned host
                         memory, which takes a power of two for each tensor
    g                    w n / 50     the penalty, one micro-batch: of a few weights at a time (of one, if that is more)
                                      and of one more, while the loss passes by
    Σg                   w n          the penalty, several micro-batches: their sum stands beside the gradients
    g of two passes      w n          where a pass of its own forms it: it becomes the gradient; Σg and g, 2 w n, with
                                      several micro-batches
    activations          what autograd keeps of one forward pass, and what a backward pass needs beside it
    optimizer            w N on a GPU (all tensors at once), 2 w of the largest parameter on a CPU
    best weights so far  w N in host memory, twice while they are renewed; on a CPU that is the same memory

The peak is the states plus the largest of the phases of a step.
"""

from dataclasses import dataclass

from ssiuu_fast.host_references import SLOTS, pinned_size, place_size, slot_size
from ssiuu_fast.ops.blockwise8 import BLOCK
from ssiuu_fast.planning.dry_run import Workload, attribution, unlearning_step
from ssiuu_fast.planning.skeleton import Skeleton
from ssiuu_fast.ranks import BUCKET, UNDER_WAY

OPTIMIZER = "optimizer"
KEEPING = "keeping the best weights"


@dataclass(frozen=True)
class Need:
    """The memory and the work of one kind of run.

    states: bytes that are there throughout. phases: the most bytes beside them, by phase of a step. kept: bytes of the
    activations that autograd keeps of one forward pass; logits: of the logits among them. gradients, sums: bytes of the
    gradients, and of Σg (in two passes also g) beside them, all in the phases. flops: of a step. moved: bytes that
    optimizer, gradients and penalty read and write in a step. host: bytes in host memory where that is another one,
    while the best weights are renewed; offloaded: of the references, throughout.
    two_passes: of the penalty on parameters, why it takes them; empty where it doesn't.
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
    offloaded: int = 0
    two_passes: str = ""

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
    offload: bool = False,
    rows: int | None = None,
    on_cpu: bool = False,
    sharded: bool = False,
) -> Need:
    """Unlearning by GD, with the penalty at a grain ("parameter", "neuron") or without (None).

    offload: references in host memory. rows: of the forget set; neurons with several micro-batches are compared sample
    by sample. sharded: a step as FSDP2 takes it, on whole weights (`sharded_peak` divides them).
    """
    run = unlearning_step(skeleton, workload, grain, sharded=sharded)
    counts, width = skeleton.counts, _width(skeleton)
    weights = width * counts.parameters
    states = {"weights": weights, "AdamW states": 2 * weights}
    references = [] if grain is None else reference_bytes(skeleton, workload, grain, state_dtype, rows)
    reference_sum = sum(map(sum, references))
    offload = offload and grain == "parameter"
    if grain is not None:
        states["references"] = SLOTS * slot_size(list(map(place_size, references))) if offload else reference_sum
    phases = run.phases | {OPTIMIZER: weights + (2 * width * counts.largest if on_cpu else weights)}
    copied = width * counts.copied
    if on_cpu:
        states["best weights so far"] = copied
        phases[KEEPING] = weights + copied
    regularized = width * sum(counts.regularized) if grain == "parameter" else 0
    # AdamW reads weight, gradient and both moments and writes all but the gradient
    moved = 7 * weights + _gradient_traffic(weights, workload)
    if regularized:
        moved += _penalty_traffic(regularized, reference_sum, workload, bool(run.two_passes))
    return Need(
        states=states,
        phases=phases,
        kept=run.kept,
        logits=_logits(skeleton, workload) if skeleton.head is None else 0,
        flops=run.flops,
        moved=moved,
        gradients=weights,
        sums=(2 if run.two_passes else 1) * regularized if workload.split else 0,
        host=0 if on_cpu else 2 * copied,
        offloaded=sum(map(pinned_size, references)) if offload else 0,
        two_passes=run.two_passes,
    )


def data_parallel_peak(need: Need, skeleton: Skeleton) -> int:
    """The peak on each of several GPUs that hold the whole model and share the rows; need: of one GPU's rows.

    DistributedDataParallel keeps the gradients once more, in its buckets. The penalty's g is whole only over all GPUs:
    it stands beside the gradients, and beside it the buffers that small tensors are summed in.
    """
    if not need.gradients:
        return need.peak
    g = _width(skeleton) * sum(skeleton.counts.regularized) if "references" in need.states else 0
    buffers = min(g, (UNDER_WAY + 1) * BUCKET)
    return max(need.peak, sum(need.states.values()) + need.gradients + g + buffers) + need.gradients


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
) -> list[tuple[int, ...]]:
    """Bytes of the tensors of each reference: a parameter's as `state_dtype` says, that of all neurons in fp32."""
    if grain == "neuron":
        return [(4 * skeleton.counts.neurons * ((rows or workload.batch_size) if workload.split else 1),)]
    if state_dtype == "8bit":
        return [(numel, 4 * -(-numel // BLOCK)) for numel in skeleton.counts.regularized]
    return [(_state_width(skeleton, state_dtype) * numel,) for numel in skeleton.counts.regularized]


def _gradient_traffic(weights: int, workload: Workload) -> int:
    """Bytes that gradients take in a step: each backward pass writes its own, and all but the first add it up."""
    passes = 2 * workload.micro_batches
    return weights + 4 * weights * (passes - 1)


def _penalty_traffic(regularized: int, references: int, workload: Workload, two_passes: bool) -> int:
    """Bytes that the penalty reads and writes, beside the gradients' own; regularized: of g, references: all of A^ref.

    One pass: the product writes g, or adds it to Σg; penalty_ reads it with φ, dW and A^ref, writes dW and A^ref.
    Two: g is written, and added to Σg; penalty_ reads the sum, φ and A^ref and writes the last and, over g in place,
    the gradient, to which dW is then added; with several micro-batches it adds to the gradient that is there.
    """
    later = workload.micro_batches - 1
    if not two_passes:
        return (5 + 2 * later) * regularized + 2 * references
    if later:
        return (5 + 4 * later) * regularized + 2 * references
    return 7 * regularized + 2 * references


def _state_width(skeleton: Skeleton, state_dtype: str | None) -> int:
    return {None: _width(skeleton), "float32": 4, "bfloat16": 2}[state_dtype]


def _logits(skeleton: Skeleton, workload: Workload) -> int:
    return _width(skeleton) * workload.rows_at_once * workload.length * skeleton.vocabulary


def _width(skeleton: Skeleton) -> int:
    return skeleton.dtype.itemsize
