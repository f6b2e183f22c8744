"""A regulariser's state in files: tensors in safetensors, everything else in JSON."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS = "references.safetensors"
PLAIN = "state.json"


def save_regularizer(regularizer, folder: Path) -> None:
    """Writes state_dict() into a new folder."""
    state = regularizer.state_dict()
    folder.mkdir()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in (state["references"] or {}).items()}
    save_file(tensors, folder / TENSORS)
    plain = {name: value for name, value in state.items() if name != "references"}
    plain["has_references"] = state["references"] is not None
    (folder / PLAIN).write_text(json.dumps(plain) + "\n", encoding="utf-8")


def load_regularizer(regularizer, folder: Path) -> None:
    """Takes up what `save_regularizer` wrote; raises ValueError for a state of other settings or parameters."""
    state = json.loads((folder / PLAIN).read_text(encoding="utf-8"))
    references: dict[str, Tensor] | None = load_file(folder / TENSORS) if state.pop("has_references") else None
    regularizer.load_state_dict(state | {"references": references})
