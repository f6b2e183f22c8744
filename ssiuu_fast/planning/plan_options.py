"""The options of `plan`. Docstrings are what `--help` prints; a YAML file has the same names."""

from dataclasses import dataclass
from typing import Literal

from ssiuu_fast.option_checks import require, require_above_zero


@dataclass
class PlanOptions:
    """What is to run, and on what. Nothing runs: of a model only config.json is read.

    Args:
        model: folder or hub name. Left open: a Llama of the sizes below.
        hidden_size: width of the Llama.
        layers: its blocks.
        heads: its attention heads.
        kv_heads: heads of its keys and values; left open, as many as heads.
        intermediate_size: width of its MLP; left open, about 8/3 of hidden_size.
        vocab_size: size of its vocabulary.
        batch_size: forget rows a step, and retain rows as many.
        micro_batch_size: rows at once; left open, all of them.
        length: tokens of a row, padding included.
        dtype: weights in memory.
        state_dtype: what the penalty's references are stored in; left open, the dtype of the weights.
        offload: the penalty's references are kept in host memory.
        granularity: what the penalty is on, see unlearn.
        gradient_checkpointing: activations of blocks are computed again in every backward pass instead of kept.
        rows: forget rows; with it the plan also tells the time of an epoch.
        gpus: 1 to 8, which share the rows of a step. An estimate by formulas.
        device: A100-80, H100, H200, B200, RTX-4090, RTX-5090, or cpu, whose speed is then measured for a second. Left
            open: all of those GPUs.
        memory: of a device that isn't listed, in GB of 10^9 bytes; give bandwidth and tflops with it.
        bandwidth: of its memory, in GB/s.
        tflops: of its matrix products in `dtype`.
    """

    model: str | None = None
    hidden_size: int = 3072
    layers: int = 28
    heads: int = 24
    kv_heads: int | None = None
    intermediate_size: int | None = None
    vocab_size: int = 128256
    batch_size: int = 16
    micro_batch_size: int | None = None
    length: int = 512
    dtype: Literal["float32", "bfloat16"] = "float32"
    state_dtype: Literal["float32", "bfloat16", "8bit"] | None = None
    offload: bool = False
    granularity: Literal["parameter", "neuron"] = "parameter"
    gradient_checkpointing: bool = False
    rows: int | None = None
    gpus: int = 1
    device: str | None = None
    memory: float | None = None
    bandwidth: float | None = None
    tflops: float | None = None

    def __post_init__(self):
        require(self, 1, "hidden_size", "layers", "heads", "kv_heads", "intermediate_size", "vocab_size")
        require(self, 1, "batch_size", "micro_batch_size", "rows", "gpus")
        require(self, 2, "length")
        require_above_zero(self, "memory", "bandwidth", "tflops")
        if self.gpus > 8:
            raise ValueError(f"gpus must be at most 8, got {self.gpus}")
        if self.batch_size % self.gpus:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of gpus={self.gpus}, which share the rows"
            )
        limits = [self.memory, self.bandwidth, self.tflops]
        if any(limit is not None for limit in limits) and (None in limits or self.device is not None):
            raise ValueError(
                "of a device that isn't listed give memory, bandwidth and tflops, all three, and no device"
            )
        if self.granularity == "neuron" and self.state_dtype not in (None, "float32"):
            raise ValueError("state_dtype: neurons have small references in float32, leave it out")
        if self.offload and self.granularity == "neuron":
            raise ValueError("offload: neurons have small references, leave it out")
        if self.offload and self.gpus > 1:
            raise ValueError(
                "offload works on whole weights, and several GPUs are planned as sharing them: leave it out"
            )
        if self.offload and self.device == "cpu":
            raise ValueError("offload: on the CPU the references are in host memory anyway, leave it out")
