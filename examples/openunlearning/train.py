"""OpenUnlearning's src/train.py with the penalised trainers registered; run it from the root of its checkout."""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    if not Path("src/trainer").is_dir():
        sys.exit(f"{Path.cwd()} has no src/trainer: run this from the root of an OpenUnlearning checkout")
    # src is what Python itself would have put there for src/train.py
    sys.path[:0] = [str(Path("src").resolve()), str(HERE)]
    import ssiuu  # noqa: F401

    sys.argv[1:1] = ["--config-dir", str(HERE / "configs")]
    runpy.run_path("src/train.py", run_name="__main__")
