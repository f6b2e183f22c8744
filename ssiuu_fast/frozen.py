"""A model that is only looked at: in evaluation mode, its parameters frozen, its checkpointing on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from ssiuu_fast import engines


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode with no parameter requiring grad; afterwards as it was.

    transformers checkpoints a block only where the block is in training mode: those that are to be checkpointed are,
    and what they checkpoint runs in evaluation mode like the rest.
    """
    modes = [(module, module.training) for module in model.modules()]
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    checkpoints = [
        (module, module._gradient_checkpointing_func)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func")
    ]
    try:
        model.eval()
        for parameter in training:
            parameter.requires_grad_(False)
        for module, checkpoint in checkpoints:
            module.training = True
            module._gradient_checkpointing_func = _in_evaluation(module, checkpoint)
        yield
    finally:
        for parameter in training:
            parameter.requires_grad_(True)
        for module, checkpoint in checkpoints:
            module._gradient_checkpointing_func = checkpoint
        for module, mode in modes:
            module.training = mode


def _in_evaluation(module: nn.Module, checkpoint: Callable) -> Callable:
    def run(function: Callable, *args, **kwargs):
        def evaluate(*inputs, **options):
            module.training = False
            try:
                return function(*inputs, **options)
            finally:
                module.training = True

        return checkpoint(evaluate, *args, **kwargs)

    return run


def refuse_reentrant(model: nn.Module) -> None:
    """Raises ValueError where blocks are checkpointed by a second run that hides them from autograd."""
    for name, module in model.named_modules():
        how = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and how.get("use_reentrant"):
            raise ValueError(f"{name or 'the model'}: {engines.REENTRANT_REMEDY}")
