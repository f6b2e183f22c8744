"""Which modules an objective looks into and trains, whatever the model is wrapped in."""

from collections.abc import Iterable, Sequence

from torch import nn

from ssiuu_fast.sites import Place, Site, find_sites

FFN_KINDS = ("gate", "up", "down")
ANY = ("layers.*",)


def chosen_sites(
    model: nn.Module, objective: str, kinds: Sequence[str], patterns: Iterable[str] | None
) -> dict[Site, Place]:
    """The sites of these kinds, chosen by name; or those that the patterns fit (`find_sites`).

    Raises ValueError for a model with adapters, for quantised weights, and where no module has a known name.
    """
    if hasattr(model, "peft_config") or any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            f"{objective} trains weights of the model itself, and this one has adapters (PEFT), which would be trained "
            "in their place: give the model without them, or merge them first by merge_and_unload()"
        )
    places = find_sites(model, ANY if patterns is None else patterns)
    if patterns is None:
        known = {site: place for site, place in places.items() if site.kind in kinds}
        if not known:
            raise ValueError(
                f"{type(model).__name__} has no linear module in its blocks whose name is known as "
                f"{' or '.join(kinds)} of an FFN ({', '.join(place.path for place in list(places.values())[:8])}): "
                "name them by modules=[...], patterns over module paths"
            )
        places = known
    for place in places.values():
        if not place.module.weight.is_floating_point():
            raise ValueError(
                f"{objective} trains {place.path}.weight, which is quantised ({place.module.weight.dtype}): load the "
                "model without quantisation"
            )
    return places


def block_paths(model: nn.Module) -> dict[int, str]:
    """Paths of the numbered blocks, by number."""
    return {site.layer: _block_of(place.path) for site, place in find_sites(model, ANY).items()}


def refuse_patterns(modules) -> None:
    """Raises ValueError where the option `modules` isn't None or a list of patterns."""
    if isinstance(modules, str):
        raise ValueError(f"modules must be a list of patterns, got the string {modules!r}: write [{modules!r}]")


def _block_of(path: str) -> str:
    parts = path.split(".")
    number = next(place for place, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[: number + 1])


class TrainedAlone:
    """Parameters that alone require grad, until `release`."""

    def __init__(self, model: nn.Module, names: Iterable[str]):
        names = set(names)
        self._before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)

    def release(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._before[name])
