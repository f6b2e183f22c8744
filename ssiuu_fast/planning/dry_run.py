"""A step of unlearning or attribution on fake tensors: what is alive when, and how many operations it asks for.

The steps follow unlearning.py with the two grains, and attribution.py, without what makes no memory of size;
tests/planning holds them to the real ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ssiuu_fast import engines
from ssiuu_fast.attribution_taps import AttributionTaps
from ssiuu_fast.frozen import frozen
from ssiuu_fast.objectives.answer_head import head_replaced
from ssiuu_fast.ops.sequence_log_probs import HiddenLogProbs, SequenceLogProbs
from ssiuu_fast.parameter_step import HeldGradients
from ssiuu_fast.planning.live_memory import LiveMemory
from ssiuu_fast.planning.skeleton import Skeleton, first_line
from ssiuu_fast.selection import select_modules, select_parameters
from ssiuu_fast.shared_backward import SharedBackward
from ssiuu_fast.taps import PendingInjections, TappedOutput, Taps

FORWARD = "forward of the forget rows"
FORWARD_ALONE = "forward"
TARGET = "backward of the target"
LOSS = "backward of the loss"
RETAIN_FORWARD = "forward of the retain rows"
RETAIN_BACKWARD = "backward of the retain rows"


@dataclass(frozen=True)
class Workload:
    """A step: rows of `length` tokens, padded, `rows_at_once` of them in one forward pass."""

    batch_size: int
    rows_at_once: int
    length: int

    @property
    def split(self) -> bool:
        return self.rows_at_once < self.batch_size

    @property
    def micro_batches(self) -> int:
        return -(-self.batch_size // self.rows_at_once)


@dataclass(frozen=True)
class DryRun:
    """What a step did: the most bytes alive in each phase, made by the step itself (weights and states are not).

    kept: bytes that autograd keeps of one forward pass. flops: multiplications and additions of the whole step.
    two_passes: of the penalty on parameters, why g takes a backward pass of its own; empty where the loss's gives it.
    """

    phases: dict[str, int]
    kept: int
    flops: int
    two_passes: str = ""


def unlearning_step(skeleton: Skeleton, workload: Workload, grain: str | None, *, sharded: bool = False) -> DryRun:
    """A GD step, with the penalty at the grain "parameter" or "neuron", or without (None).

    The forget rows, then the retain rows; gradients are alive from their first backward pass to the end. Every token
    after the first is one of an answer: what shorter answers take is less. sharded: a step as FSDP2 has to take it, on
    whole weights.
    """
    with _recording(skeleton) as record:
        sending = _sending(grain, sharded)(skeleton)
        before = record.memory.flops
        # from the second micro-batch on, all are alike
        parts = 2 if workload.split else 1
        for part in range(parts):
            record.memory.flops = before
            with record.phase(FORWARD):
                log_probs = _log_probs(skeleton, workload)
            if part == 0:
                kept = record.memory.bytes()
            sending.send_back(log_probs, record, last=part == parts - 1)
        with record.phase(RETAIN_FORWARD):
            log_probs = _log_probs(skeleton, workload)
        with record.phase(RETAIN_BACKWARD):
            log_probs.sum().backward()
        flops = record.memory.flops * workload.batch_size // workload.rows_at_once
    return DryRun(record.phases, kept, flops, sending.two_passes)


def attribution(skeleton: Skeleton, workload: Workload) -> DryRun:
    """One batch of `rows_at_once` rows, whose answers may begin anywhere: all logits are formed."""
    with _recording(skeleton) as record, frozen(skeleton.model):
        taps = AttributionTaps(select_modules(skeleton.model, None), lambda name, hidden, gradient: None)
        with taps.attached():
            with record.phase(FORWARD_ALONE):
                log_probs = _log_probs_of_logits(skeleton, workload)
            kept = record.memory.bytes()
            with record.phase(TARGET):
                taps.backward(log_probs.sum())
    return DryRun(record.phases, kept, record.memory.flops)


class _Record:
    def __init__(self, memory: LiveMemory):
        self.memory = memory
        self.phases: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.memory.reset_peak()
        yield
        self.phases[name] = max(self.phases.get(name, 0), self.memory.peak)


@contextmanager
def _recording(skeleton: Skeleton) -> Iterator[_Record]:
    skeleton.model.train()
    try:
        with skeleton.fake:
            # its one pass isn't the step's
            _ = skeleton.head
        with skeleton.fake, LiveMemory() as memory:
            yield _Record(memory)
    except RuntimeError as error:
        raise ValueError(
            f"a model of type {skeleton.name!r} can't be run without memory ({first_line(error)}): give the shape of a "
            "similar Llama by numbers instead of --model"
        ) from error
    finally:
        skeleton.model.zero_grad(set_to_none=True)


class _Loss:
    """Sends back the loss of the forget rows; of a subclass, with the penalty."""

    # see DryRun
    two_passes = ""

    def __init__(self, skeleton: Skeleton):
        pass

    def send_back(self, log_probs: Tensor, record: _Record, last: bool) -> None:
        with record.phase(LOSS):
            log_probs.sum().backward()


class _TwoPasses(_Loss):
    """parameter_grain.py with a pass for g: Σg over micro-batches, and the g just formed; the sum becomes `.grad`."""

    two_passes = "the weights are sharded"

    def __init__(self, skeleton: Skeleton):
        super().__init__(skeleton)
        self._parameters = list(select_parameters(skeleton.model, None).values())
        self._sums: list[Tensor | None] | None = None

    def send_back(self, log_probs: Tensor, record: _Record, last: bool) -> None:
        with record.phase(TARGET):
            self._add(log_probs.exp().sum())
            if last:
                for parameter, gradient in zip(self._parameters, self._sums, strict=True):
                    if parameter.grad is None:
                        parameter.grad = gradient
                self._sums = None
        super().send_back(log_probs, record, last)

    def _add(self, target: Tensor) -> None:
        gradients = [
            None if gradient is None else gradient.contiguous()
            for gradient in engines.differentiate(target, self._parameters)
        ]
        self._sums = self._sums or gradients


class _OnePass(_TwoPasses):
    """parameter_step.py where g comes with the loss: of the last micro-batch a few weights at a time, summed before."""

    two_passes = ""

    def __init__(self, skeleton: Skeleton):
        super().__init__(skeleton)
        parameters = select_parameters(skeleton.model, None)
        self._shared = _RowsThatDiffer(skeleton.model, parameters)
        self._gradients: list[Tensor | None] = [None] * len(parameters)

    def send_back(self, log_probs: Tensor, record: _Record, last: bool) -> None:
        loss = log_probs.sum()
        plan = self._shared.plan(log_probs.exp().sum(), loss, 1.0)
        self.two_passes = plan.reason
        if plan.reason:
            super().send_back(log_probs, record, last)
            return
        with record.phase(LOSS):
            # the penalty is added to `.grad` in place
            held = HeldGradients(self._parameters)
            self._shared.run(plan, loss, self._gradients, held.add if last else None)


class _RowsThatDiffer(SharedBackward):
    """Fake tensors have no values that tell rows apart: here every row has a part in g, each with its own weight."""

    def row_factors(self, of_target: Tensor, of_loss: Tensor, scale: float) -> list[float | None]:
        return [1.0 + row for row in range(len(of_target))]


class _Neurons(_Loss):
    """neuron_grain.py: one tensor of each tapped output waits for the loss's own backward pass."""

    def __init__(self, skeleton: Skeleton):
        self._taps = Taps(select_modules(skeleton.model, None))
        # the first graph that is measured shows which outputs the model overwrites; those alone stay copied
        target = _log_probs(skeleton, Workload(1, 1, 2)).sum()
        self._taps.measure(target, lambda output, hidden, gradient: None, retain_graph=False)

    def send_back(self, log_probs: Tensor, record: _Record, last: bool) -> None:
        with record.phase(TARGET):
            self._measure(log_probs.exp().sum())
        super().send_back(log_probs, record, last)

    def _measure(self, target: Tensor) -> None:
        pending = PendingInjections()
        injections: list[tuple[TappedOutput, Tensor]] = []

        def see(output: TappedOutput, hidden: Tensor, gradient: Tensor) -> None:
            injections.append((output, gradient.detach().clone(memory_format=torch.contiguous_format)))

        self._taps.measure(target, see)
        for output, injection in injections:
            output.inject(injection, pending)


def _sending(grain: str | None, sharded: bool) -> type[_Loss]:
    if grain == "parameter":
        return _TwoPasses if sharded else _OnePass
    return _Loss if grain is None else _Neurons


def _log_probs(skeleton: Skeleton, workload: Workload) -> Tensor:
    """As objectives/log_probs.py forms them."""
    head = skeleton.head
    if head is None:
        return _log_probs_of_logits(skeleton, workload)

    def log_probs(hidden: Tensor) -> Tensor:
        # as many as there are at most: how many of them labels count can't be known of tensors without values
        places = torch.empty((3, workload.rows_at_once * (workload.length - 1)), dtype=torch.int64)
        return HiddenLogProbs.apply(hidden, head.weight, head.bias, *places)[:, None, None]

    with head_replaced(head, log_probs):
        return _forward(skeleton, workload)[1].flatten()


def _log_probs_of_logits(skeleton: Skeleton, workload: Workload) -> Tensor:
    tokens, logits = _forward(skeleton, workload)
    # sequence_log_probs without its look at the labels, which have no values here
    return SequenceLogProbs.apply(logits[:, :-1], tokens[:, 1:], -100)


def _forward(skeleton: Skeleton, workload: Workload) -> tuple[Tensor, Tensor]:
    """Tokens, and what the model puts out as their logits."""
    shape = (workload.rows_at_once, workload.length)
    tokens = torch.zeros(shape, dtype=torch.int64)
    mask = torch.ones(shape, dtype=torch.int64)
    return tokens, skeleton.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
