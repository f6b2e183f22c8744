"""A run's folder: its configuration, versions, log and results, written so that nothing is lost or overwritten."""

import json
import math
import os
import platform
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch

import ssiuu_fast

PACKAGES = (
    "torch", "transformers", "tokenizers", "datasets", "accelerate", "peft", "rouge-score", "scipy", "triton", "numpy",
)  # fmt: skip
# where a run leaves its model
MODEL_FOLDER = "model"


class RunFolder:
    """A folder that one run writes into."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, path: str | Path | None, command: str, options: dict) -> "RunFolder":
        """A new folder with config.json: the command, its resolved options, versions and hardware.

        path None: runs/<command>-<time>. Raises FileExistsError where it exists: a run is never overwritten.
        """
        if path is None:
            path = Path("runs") / f"{command}-{datetime.now():%Y%m%d-%H%M%S}"
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=False)
        except FileExistsError:
            raise FileExistsError(
                f"{path} exists: a run is never overwritten. Name another --output, or remove it"
            ) from None
        folder = cls(path)
        folder.write_json("config.json", {"command": command, "options": options} | environment())
        return folder

    @classmethod
    def stopped(cls, path: str | Path, command: str) -> tuple["RunFolder", dict]:
        """The folder of a stopped run and the options that it was started with.

        Raises ValueError for the folder of another command, OSError where there is none.
        """
        folder = cls(Path(path))
        config = folder.read_json("config.json")
        if config["command"] != command:
            raise ValueError(f"{path} is the folder of `{config['command']}`, and only a {command} can be resumed here")
        print(f"going on in {path} with the options it was started with")
        return folder, config["options"]

    def file(self, name: str) -> Path:
        return self.path / name

    def write_json(self, name: str, content) -> None:
        """Replaces the file as a whole, so that a reader never sees half of it.

        Numbers that are NaN or infinite become null: JSON has no word for them, and many readers refuse a file that
        makes one up.
        """
        temporary = self.file(f"{name}.tmp")
        temporary.write_text(
            json.dumps(finite_or_null(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
        os.replace(temporary, self.file(name))

    def read_json(self, name: str):
        return json.loads(self.file(name).read_text(encoding="utf-8"))

    def log(self, name: str, row: dict) -> None:
        """Appends one JSON line."""
        with self.file(name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def finite_or_null(content):
    """The same dicts, lists and values, with None for every number that is NaN or infinite."""
    if isinstance(content, dict):
        return {name: finite_or_null(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite_or_null(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def environment() -> dict:
    """Versions and hardware that a result depends on."""
    versions = {"python": platform.python_version(), "ssiuu-fast": ssiuu_fast.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "argv": sys.argv,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
