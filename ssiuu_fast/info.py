"""What this installation is: version, what was built, which backends can run here and why the others can't."""

import platform

import torch

import ssiuu_fast
from ssiuu_fast.ops.backends import availability


def text() -> str:
    """The report of `ssiuu-fast info`, a line a fact."""
    lines = [
        f"ssiuu-fast {ssiuu_fast.__version__}",
        f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}",
        "backends:",
    ]
    lines += [
        f"  {row.backend:<10} {'can run' if row.usable else 'can not run'}: {row.reason}" for row in availability()
    ]
    return "\n".join(lines)
