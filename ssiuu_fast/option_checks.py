"""What options are checked for as soon as they are read."""


def require(options, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum:g}, got {value!r}")


def require_above_zero(options, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a number above 0, got {value!r}")
