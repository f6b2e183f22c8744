"""Which parameters of a model are regularised."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

NamedParameters = dict[str, nn.Parameter]


def select_parameters(
    model_or_named_parameters: nn.Module | Iterable[tuple[str, nn.Parameter]], patterns: Iterable[str] | None
) -> NamedParameters:
    """The parameters to regularise, by name; a tied parameter once.

    patterns None: of a model, the weights of the linear modules inside its blocks that require grad (METHOD, open
    point 6); of named parameters, all that require grad. Otherwise those that require grad and match one of the
    glob patterns. Raises ValueError where nothing is left, or a pattern matches nothing.
    """
    if isinstance(patterns, str):
        raise ValueError(
            f"parameters must be a list of glob patterns, got the string {patterns!r}: write [{patterns!r}]"
        )
    if isinstance(model_or_named_parameters, nn.Module):
        named = dict(model_or_named_parameters.named_parameters())
        candidates = _block_weights(model_or_named_parameters) if patterns is None else named
    else:
        named = candidates = _unique(model_or_named_parameters)
    if patterns is not None:
        candidates = _matching(named, list(patterns))
    selected = {name: parameter for name, parameter in candidates.items() if parameter.requires_grad}
    if not selected:
        raise ValueError(_nothing_selected(len(named), len(candidates), patterns))
    return selected


def _block_weights(model: nn.Module) -> NamedParameters:
    """Weights of linear modules that live in a numbered block (`model.layers.3.self_attn.q_proj`)."""
    found = {}
    for name, module in model.named_modules():
        in_block = any(part.isdecimal() for part in name.split("."))
        if in_block and _is_linear(module):
            found[f"{name}.weight"] = module.weight
    return _unique(found.items())


def _is_linear(module: nn.Module) -> bool:
    # GPT-2's Conv1D is a linear module by another name; asking by class name keeps transformers out of the import
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _unique(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> NamedParameters:
    seen: set[int] = set()
    unique = {}
    for name, parameter in named_parameters:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            unique[name] = parameter
    return unique


def _matching(named: NamedParameters, patterns: list[str]) -> NamedParameters:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ValueError(
                f"parameters: the pattern {pattern!r} matches none of the {len(named)} parameters "
                f"(the first is {next(iter(named), None)!r})"
            )
    return {name: p for name, p in named.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _nothing_selected(total: int, candidates: int, patterns: Iterable[str] | None) -> str:
    if candidates:
        return (
            f"none of the {candidates} selected parameters requires grad: unfreeze them before building the regulariser"
        )
    if patterns is None and total:
        return (
            f"no linear module in a numbered block was found among {total} parameters: "
            "choose the parameters by name, parameters=['*weight']"
        )
    return "there are no parameters to regularise"
