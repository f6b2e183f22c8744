"""What a block of a model puts out, seen while the whole model runs."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ssiuu_fast import engines


class TappedBlock:
    """hidden: [B, T, d] of the last forward pass, with its graph; fp32, or fp64 where the model computes in it."""

    def __init__(self, model: nn.Module, path: str):
        self._model = model
        self._path = path
        self._outputs: list[Tensor] = []

    @property
    def hidden(self) -> Tensor:
        if len(self._outputs) != 1:
            raise RuntimeError(
                f"{self._path} ran {len(self._outputs)} times in one forward pass of the model, not once"
            )
        hidden = self._outputs[0]
        return hidden if hidden.dtype == torch.float64 else hidden.float()

    def run(self, inputs: dict[str, Tensor]) -> None:
        """A forward pass for the block's sake: logits of one position at most, where the model can leave them out."""
        takes = inspect.signature(type(engines.bare(self._model)).forward).parameters
        fewer = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False, **fewer)

    def see(self, module: nn.Module, inputs: tuple, output) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if torch.is_grad_enabled() and not hidden.requires_grad:
            raise RuntimeError(
                f"no gradient reaches {self._path}: was the model frozen after prepare(), or is it checkpointed by a "
                f"second run that hides it? {engines.REENTRANT_REMEDY}"
            )
        self._outputs.append(hidden)


@contextmanager
def output_of(model: nn.Module, path: str) -> Iterator[TappedBlock]:
    """Sees the output of the module at that path of the bare model, in one forward pass of the (wrapped) model.

    Raises ValueError for a compiled model, which may leave hooks out.
    """
    engines.refuse_compiled(model)
    block = TappedBlock(model, path)
    handle = engines.bare(model).get_submodule(path).register_forward_hook(block.see)
    try:
        yield block
    finally:
        handle.remove()
