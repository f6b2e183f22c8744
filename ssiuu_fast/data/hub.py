"""Rows of a data set on the Hugging Face hub, read through `datasets`."""

from collections.abc import Iterator
from pathlib import Path


def hub_rows(source, name: str | None = None) -> Iterator[tuple[str, dict]]:
    """("source, row n", row) of a data set's train split; `name` is its configuration.

    Raises FileNotFoundError when `source` is a path and not of the form owner/name.
    """
    if Path(source).is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1:
        raise FileNotFoundError(f"{source}: no such file or folder, and not a hub name (owner/name) either")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"reading {source} by hub name needs `datasets`: install ssiuu-fast[unlearn]") from error
    rows = datasets.load_dataset(str(source), name, split="train")
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows, start=1))
