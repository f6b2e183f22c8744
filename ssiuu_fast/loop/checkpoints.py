"""Checkpoints that are whole or not there, and what unlearning adds to those of transformers.Trainer."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from ssiuu_fast.disk import to_disk
from ssiuu_fast.loop.best import BestWeights
from ssiuu_fast.ranks import Ranks

# names that neither transformers nor a reader takes for a checkpoint
STAGING = ".saving-"
REMOVED = ".removing-"
NOTES = "unlearning.json"
TENSORS = "unlearning.safetensors"
BEST = "best.safetensors"
REGULARIZER = "regularizer"
VERSION = 2
# the setting that says which weights beside the trained ones a run is on
FROZEN_WEIGHTS = "frozen_weights"


@contextmanager
def staged(run: Path, name: str, ranks: Ranks, writer: bool) -> Iterator[Path]:
    """A folder in which to write `name`/…; at the end it becomes run/name, as a whole, after everything is on disk.

    A process that is killed meanwhile leaves nothing but a folder that `sweep` removes. Every rank enters; the writer
    of each machine makes and renames.
    """
    staging = run / f"{STAGING}{name}"
    if writer:
        shutil.rmtree(staging, ignore_errors=True)
        (staging / name).mkdir(parents=True)
    _wait(ranks)
    yield staging
    _wait(ranks)
    if writer:
        _tree_to_disk(staging / name)
        if (run / name).exists():
            remove(run / name)
        os.rename(staging / name, run / name)
        to_disk(run)
        shutil.rmtree(staging)
    _wait(ranks)


def remove(checkpoint: Path) -> None:
    """Under its own name the checkpoint is there as a whole until it is gone."""
    away = checkpoint.with_name(f"{REMOVED}{checkpoint.name}")
    shutil.rmtree(away, ignore_errors=True)
    os.rename(checkpoint, away)
    shutil.rmtree(away)


def rotate(run: Path, limit: int | None) -> None:
    """Removes the checkpoints written first, until `limit` are left; None keeps all."""
    if limit is None or limit < 1:
        return
    for checkpoint in sort_checkpoints(str(run), use_mtime=True)[:-limit]:
        remove(Path(checkpoint))


def refuse_older(run: Path) -> None:
    """Raises ValueError where another run left checkpoints: resuming would not tell them from the new run's."""
    older = get_last_checkpoint(str(run)) if run.is_dir() else None
    if older is not None and (Path(older) / NOTES).exists():
        raise ValueError(
            f"{run} holds {Path(older).name} of an earlier run: go on with it, resume_from_checkpoint=True, or use "
            "another output_dir"
        )


def sweep(run: Path) -> None:
    """Removes what a killed run left half-written or half-removed."""
    for prefix in (STAGING, REMOVED):
        for left in run.glob(f"{prefix}*"):
            shutil.rmtree(left)


def find(run: Path, asked: str | bool | None) -> Path | None:
    """The checkpoint to resume from: the last one of the run for True, the folder that is named, or None.

    Raises ValueError where it isn't there, or wasn't written by an unlearning run.
    """
    if asked is None or asked is False:
        return None
    last = get_last_checkpoint(str(run)) if asked is True and run.is_dir() else None
    if asked is True and last is None:
        raise ValueError(f"resume_from_checkpoint=True, but {run} has no checkpoint: start without it")
    folder = Path(last if asked is True else asked)
    if not (folder / NOTES).is_file():
        raise ValueError(
            f"{folder} has no {NOTES}: it is not a checkpoint of UnlearningTrainer, or was saved with save_only_model"
        )
    return folder


def write_notes(folder: Path, settings: dict, best: BestWeights | None, state: dict[str, Tensor | int | float | str]):
    """Settings of the run, the best weights so far, and tensors and plain values of the objective. All ranks call it.

    best None: the run keeps none.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in state.items() if name not in tensors}
    kept = best.meta() if best is not None and best.kept else None
    writes = not dist.is_initialized() or dist.get_rank() == 0
    if best is not None and best.kept and folder.name != f"checkpoint-{best.step}":
        best.save(folder / BEST)
    if writes:
        if tensors:
            save_file(tensors, folder / TENSORS)
        notes = {"version": VERSION, "settings": settings, "best": kept, "state": plain}
        (folder / NOTES).write_text(json.dumps(notes, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_notes(folder: Path, settings: dict) -> tuple[dict | None, dict[str, Tensor | int | float | str]]:
    """(numbers of the best weights or None, state of the objective) of a checkpoint of a run with these settings.

    Raises ValueError where the run was another one: it would go on as neither.
    """
    notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
    if notes["version"] != VERSION:
        raise ValueError(f"{folder} has version {notes['version']}: this package reads {VERSION}")
    for name, ours in settings.items():
        saved = notes["settings"].get(name)
        if saved != ours and name == FROZEN_WEIGHTS:
            raise ValueError(
                f"{folder} is of a run on other frozen weights, which a checkpoint doesn't change: resume on the base "
                "model that it began with, in the same dtype and with the same parameters frozen, or start anew in "
                "another output_dir"
            )
        if saved != ours:
            raise ValueError(
                f"{folder} is of a run with {name}={saved!r}, this one has {name}={ours!r}: resume with the same "
                "configuration and data, or start anew in another output_dir"
            )
    tensors = load_file(folder / TENSORS) if (folder / TENSORS).exists() else {}
    return notes["best"], notes["state"] | tensors


def _wait(ranks: Ranks) -> None:
    if ranks.size > 1:
        dist.barrier(group=ranks.group)


def _tree_to_disk(folder: Path) -> None:
    for place, _, files in os.walk(folder):
        for name in files:
            to_disk(Path(place) / name)
        to_disk(Path(place))
