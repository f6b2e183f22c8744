"""The penalty at the grain of parameters: every scalar of a weight is a feature with an attribution of its own."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ssiuu_fast import engines
from ssiuu_fast.change import ChangeWatch
from ssiuu_fast.frozen import refuse_reentrant
from ssiuu_fast.ops.backends import choose
from ssiuu_fast.ops.penalty import PenaltyResult, penalty_
from ssiuu_fast.references import (
    MeanAttribution,
    References,
    StateDtype,
    empty_references,
    flat_state,
    from_flat_state,
    refuse_state_dtype,
    required,
)
from ssiuu_fast.selection import NamedParameters, select_parameters
from ssiuu_fast.step import MicroBatch, StepResult
from ssiuu_fast.warn import warn_user


class ParameterGrain:
    """The regularised parameters and what their attributions are compared with (Algorithm 1)."""

    # the first step is compared with nothing, or with a mean over other samples too
    starts_at_its_reference = False
    # ‖∂R/∂φ‖ comes with every step
    knows_share = True

    def __init__(
        self,
        model_or_named_parameters: nn.Module | Iterable[tuple[str, nn.Parameter]],
        patterns: Iterable[str] | None,
        *,
        reference: str,
        one_sided: bool,
        state_dtype: StateDtype,
        backend: str,
    ):
        if isinstance(model_or_named_parameters, nn.Module):
            model_or_named_parameters = engines.unwrap(model_or_named_parameters)
            refuse_reentrant(model_or_named_parameters)
        self._parameters = select_parameters(model_or_named_parameters, patterns)
        engines.refuse_sharded(self._parameters.items())
        engines.refuse_steps_in_backward(self._parameters.items())
        _refuse_unusual(self._parameters)
        refuse_state_dtype(state_dtype, self._parameters)
        for parameter in self._parameters.values():
            # asked for by name, a backend that can't run is refused now and not in the first step
            choose(backend, "penalty_", parameter.device, double=parameter.dtype == torch.float64)
        self._reference = reference
        self._one_sided = one_sided
        self._state_dtype = state_dtype
        self._backend = backend
        self.elements = sum(parameter.numel() for parameter in self._parameters.values())
        self._references: References | None = None
        self._change = ChangeWatch()

    @property
    def names(self) -> list[str]:
        return list(self._parameters)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._parameters.values())

    def sample_numbers(self, samples: int, sample_ids: Tensor | None, last: bool) -> None:
        """Any micro-batch will do, and samples need no names."""

    def begin(self, scale: float, weight: float | None) -> "ParameterStep":
        """A new step; the factor on the caller's loss, and λ (None while it is being calibrated) hold for all of it."""
        return ParameterStep(self, scale, weight)

    def settle(self) -> None:
        """The last step is over; its penalty was added at once, so there is nothing to judge."""

    def abandon(self) -> None:
        """Nothing of a step is left to be added."""

    def target_gradients(self, target: Tensor, *, scale: float = 1.0, retain_graph: bool = True) -> list[Tensor | None]:
        """scale · ∂T/∂φ, None for parameters outside the graph."""
        engines.refuse_frozen(self._parameters.items())
        return engines.target_gradients(target, self.parameters, scale=scale, retain_graph=retain_graph)

    def add_penalty(
        self, gradients: dict[str, Tensor | None], samples: int, scale: float, weight: float | None
    ) -> tuple[PenaltyResult, Tensor, Tensor | None]:
        """Adds the penalty's gradient to `.grad` and updates the references, in one pass over all parameters.

        gradients: scale · ∂T/∂φ by name, None for parameters outside the graph; overwritten. Returns the sums,
        the number of non-finite elements of each parameter in the graph, and what ChangeWatch measured.
        """
        first = self._references is None
        references = self._references or References(empty_references(self._parameters, self._state_dtype), samples)
        if first and self._reference == "initial":
            warn_user(
                "reference='initial' without set_reference(): the attributions of the first step's batch are kept"
            )
        references.follow(samples)

        update = self._reference == "previous" or first
        names = [name for name, gradient in gradients.items() if gradient is not None]
        # before the pass, which overwrites the gradients
        change = None if first else self._change.measure(gradients, self._parameters, references.tensors, 1.0 / scale)
        counts = torch.zeros(len(names), dtype=torch.int64, device=gradients[names[0]].device)
        result = penalty_(
            [gradients[name] for name in names],
            [self._parameters[name] for name in names],
            [references.tensors[name] for name in names],
            weight=0.0 if weight is None else weight * scale,
            # while λ is being calibrated the penalty is written over g and dropped
            out=None if weight is None else [self._parameters[name].grad for name in names],
            one_sided=self._one_sided,
            update_references=update,
            first=first,
            gradient_scale=1.0 / scale,
            nonfinite_counts=counts,
            backend=self._backend,
        )
        for name, gradient in gradients.items():
            if gradient is None and update:
                # a parameter outside this step's graph has A = 0
                references.tensors[name].zero_()
            elif gradient is not None and weight is not None and self._parameters[name].grad is None:
                self._parameters[name].grad = gradient
        self._references = references
        return result, counts, change

    def set_reference(self, targets: Iterable[MicroBatch]) -> None:
        """A_ref = φ · (b/n) · Σ_s ∂T_s/∂φ over the targets, whose graphs are freed one by one."""
        mean = MeanAttribution(self._parameters, self._state_dtype)
        for batch in targets:
            mean.add(self.target_gradients(batch.target, retain_graph=False), batch.samples)
        self._references = mean.references()

    def state_dict(self) -> dict:
        return {
            "references": None if self._references is None else flat_state(self._references.tensors),
            "reference_samples": None if self._references is None else self._references.samples,
        }

    def load_state_dict(self, state: dict) -> None:
        saved, samples = required(state, "references"), required(state, "reference_samples")
        references = None
        if saved is not None:
            references = References(from_flat_state(self._parameters, self._state_dtype, saved), samples)
        self._references = references
        self._change = ChangeWatch()


class ParameterStep:
    """Sums g over the micro-batches of a step; the penalty is formed when it is whole."""

    def __init__(self, grain: ParameterGrain, scale: float, weight: float | None):
        self.scale = scale
        self._grain = grain
        self._weight = weight
        self._gradients: list[Tensor | None] = []
        self._samples = 0
        self._underflows: list[Tensor] = []

    def add(self, batch: MicroBatch) -> None:
        gradients = self._grain.target_gradients(batch.target, scale=self.scale)
        self._samples += batch.samples
        self._underflows.append(batch.underflows)
        if not self._gradients:
            self._gradients = gradients
            return
        for index, gradient in enumerate(gradients):
            if self._gradients[index] is None:
                self._gradients[index] = gradient
            elif gradient is not None:
                self._gradients[index].add_(gradient)

    def finish(self) -> StepResult:
        gradients = dict(zip(self._grain.names, self._gradients, strict=True))
        result, counts, change = self._grain.add_penalty(gradients, self._samples, self.scale, self._weight)
        return StepResult(
            penalty=result.penalty,
            negative=result.negative,
            elements=self._grain.elements,
            gradient_square=result.gradient_square,
            underflows=self._underflows,
            names=[name for name, gradient in gradients.items() if gradient is not None],
            nonfinite_counts=counts,
            absent=[name for name, gradient in gradients.items() if gradient is None],
            change=change,
        )


def _refuse_unusual(parameters: NamedParameters) -> None:
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"{name} is {parameter.dtype}: regularised parameters must be fp32, bf16, fp16 or fp64")
        if not parameter.is_contiguous():
            raise ValueError(f"{name} is not contiguous: store it contiguously, or leave it out with parameters=[...]")
