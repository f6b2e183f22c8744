"""The state of a regulariser on disk: one safetensors file a rank, and a JSON that says what lies where."""

import json
import math
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ssiuu_fast.disk import to_disk
from ssiuu_fast.ops import Blockwise8
from ssiuu_fast.regularizer import SSIUURegularizer

FILE = "regularizer.json"
CODES, ABSMAX = ".codes", ".absmax"
# of a piece of a tensor: "shape" of the whole tensor, "first" place in it and "size" of the piece
Place = dict[str, list[int]]


def save_regularizer(regularizer: SSIUURegularizer, folder: str | Path) -> None:
    """Writes everything a resumed run needs into a folder, which is made where it is missing. Call it on every rank.

    regularizer.json holds settings, numbers and what lies where; regularizer-<token>-<rank>.safetensors the references.
    A rank writes what no rank before it holds: under DDP the first one writes all, under FSDP2 each its own shards.
    The JSON comes last, so that one that is interrupted leaves the save before it in force, whose files then go.
    The folder must be one that all ranks see.

    Raises RuntimeError between the micro-batches of a step, OSError where it can't be written; on all ranks.
    """
    folder, agreement = Path(folder), regularizer.agreement
    with agreement.errors_together():
        state = regularizer.state_dict()
        tensors, rest = _parted(state)
        places = rest.pop("places", None)
        held = agreement.ranks.gather(places)
        writer = held.index(places) == agreement.ranks.rank
        token = agreement.ranks.gather(uuid.uuid4().hex[:12])[0]
        names = [f"regularizer-{token}-{rank:05}.safetensors" for rank in range(len(held))]
        if writer:
            folder.mkdir(parents=True, exist_ok=True)
            _write_tensors(tensors, folder / names[agreement.ranks.rank])
        # what the others wrote is on disk
        agreement.sums()
        if agreement.ranks.rank == 0:
            files = {names[held.index(place)]: place for place in held}
            _write_json({**rest, "files": files}, folder / FILE)
            # a save that was killed has left its .part
            for old in folder.glob("regularizer-*.safetensors*"):
                if old.name not in files:
                    old.unlink()
        agreement.sums()


def load_regularizer(regularizer: SSIUURegularizer, folder: str | Path) -> None:
    """Takes up what save_regularizer wrote, on any number of ranks. Call it on every rank.

    References of 64, 32 and 16 bits are the same to the last bit. Those of 8 bits are where this rank's part of a
    tensor is one that was saved; else they are decoded, cut and encoded again, within one code.

    Raises FileNotFoundError where there is none, ValueError for one of other settings or parameters, or one that is
    damaged; on all ranks, and nothing is changed.
    """
    folder, agreement = Path(folder), regularizer.agreement
    with agreement.errors_together():
        take_up = regularizer.prepared(_read_state(folder, regularizer.places()))
        # nothing is changed anywhere before all have read and checked theirs
        agreement.sums()
        take_up()
        agreement.sums()


def _parted(state: dict) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a state by name, and what is left for the JSON."""
    references = state["references"]
    rest = {key: value for key, value in state.items() if key != "references"}
    return references or {}, {**rest, "has_references": references is not None}


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    with _replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def _write_json(content: dict, path: Path) -> None:
    with _replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write to; what was written is on disk, and has the path's name, or neither."""
    temporary = path.with_name(f"{path.name}.part")
    try:
        yield temporary
        to_disk(temporary)
        os.replace(temporary, path)
        to_disk(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read_state(folder: Path, places: dict[str, Place] | None) -> dict:
    """The saved state, with references as this rank holds them."""
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {FILE}: give the folder that save_regularizer was given")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        files, has_references = state.pop("files"), state.pop("has_references")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another kind ({error!r})") from error
    if not isinstance(has_references, bool) or not _are_files(files):
        raise ValueError(f"{path} is damaged: its 'files' or 'has_references' is not what was written")
    references = _Pieces(folder, files).assembled(places)
    if references and not has_references:
        raise ValueError(f"{path} is damaged: it says that there are no references, and its files hold some")
    state["references"] = references if has_references else None
    return state if places is None else {**state, "places": places}


def _are_files(files) -> bool:
    """Whether these are names of files, with the places of what each holds, or None for whole tensors."""
    return (
        isinstance(files, dict)
        and len(files) > 0
        and all(re.fullmatch(r"regularizer-\w+-\d+\.safetensors", name) for name in files)
        and all(
            places is None or (isinstance(places, dict) and all(map(_is_place, places.values())))
            for places in files.values()
        )
    )


def _is_place(place) -> bool:
    if not isinstance(place, dict) or place.keys() != {"shape", "first", "size"}:
        return False
    lists = list(place.values())
    return all(
        isinstance(numbers, list) and len(numbers) == len(lists[0]) and all(type(number) is int for number in numbers)
        for numbers in lists
    )


class _Pieces:
    """The saved references, piece by piece, in files that are read as far as is needed."""

    def __init__(self, folder: Path, files: dict[str, dict[str, Place] | None]):
        from safetensors import SafetensorError, safe_open

        # of each parameter the pieces there are: file, whether in 8 bits, and place
        self._pieces: dict[str, list] = {}
        for name, places in files.items():
            try:
                file = safe_open(folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{folder / name}, which {FILE} names, can't be read: {error}") from error
            keys = set(file.keys())
            for parameter in {key.removesuffix(CODES).removesuffix(ABSMAX) for key in keys}:
                eight_bits = parameter + CODES in keys
                shape = file.get_slice(parameter + CODES if eight_bits else parameter).get_shape()
                place = _whole(shape) if places is None else places.get(parameter)
                if place is None or place["size"] != shape:
                    raise ValueError(f"{folder / name} holds {parameter} as {shape}, {FILE} says otherwise: {place}")
                self._pieces.setdefault(parameter, []).append((file, eight_bits, place))

    def assembled(self, places: dict[str, Place] | None) -> dict[str, Tensor]:
        """The references of every parameter at its place: plain tensors, of an 8-bit one its codes and absmax."""
        found = {}
        for parameter, pieces in self._pieces.items():
            shape = pieces[0][2]["shape"]
            # one that is unknown here is refused later on, with all others that are
            place = _whole(shape) if places is None else places.get(parameter, _whole(shape))
            if place["shape"] != shape:
                raise ValueError(f"the saved state has {parameter} as {shape}, this model {place['shape']}")
            found |= self._at(parameter, place)
        return found

    def _at(self, parameter: str, place: Place) -> dict[str, Tensor]:
        for file, eight_bits, saved in self._pieces[parameter]:
            if saved == place:
                suffixes = (CODES, ABSMAX) if eight_bits else ("",)
                return {parameter + suffix: file.get_tensor(parameter + suffix) for suffix in suffixes}
        cut = self._cut(parameter, place)
        if not self._pieces[parameter][0][1]:
            return {parameter: cut}
        encoded = Blockwise8.encode(cut)
        return {parameter + CODES: encoded.codes, parameter + ABSMAX: encoded.absmax}

    def _cut(self, parameter: str, place: Place) -> Tensor:
        """The values at a place, from all pieces that have some of them."""
        out = None
        missing = math.prod(place["size"])
        for file, eight_bits, saved in self._pieces[parameter]:
            bounds = [
                (max(ours, theirs), min(ours + our_size, theirs + their_size))
                for ours, our_size, theirs, their_size in zip(
                    place["first"], place["size"], saved["first"], saved["size"], strict=True
                )
            ]
            if out is not None and any(stop <= start for start, stop in bounds):
                continue
            if eight_bits:
                piece = Blockwise8(file.get_tensor(parameter + CODES), file.get_tensor(parameter + ABSMAX)).decode()
            else:
                piece = file.get_tensor(parameter)
            if out is None:
                out = piece.new_zeros(place["size"])
            if all(start < stop for start, stop in bounds):
                from_piece = _slices(bounds, saved["first"])
                out[_slices(bounds, place["first"])] = piece[from_piece]
                missing -= piece[from_piece].numel()
        if missing:
            raise ValueError(f"the saved state lacks {missing} elements of {parameter}: a file is missing in {FILE}")
        return out


def _whole(shape: list[int]) -> Place:
    return {"shape": list(shape), "first": [0] * len(shape), "size": list(shape)}


def _slices(bounds: list[tuple[int, int]], first: list[int]) -> tuple[slice, ...]:
    return tuple(slice(start - origin, stop - origin) for (start, stop), origin in zip(bounds, first, strict=True))
