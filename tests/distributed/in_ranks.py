"""Cases that run in several gloo processes, one after the other in the same ones: starting them takes longest."""

import importlib
import json
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def run_cases(module: str, folder: Path) -> dict[str, list[str]]:
    """What each rank says to each of the module's CASES: "" if it went well, else its traceback."""
    mp.spawn(_work, (module, str(folder)), nprocs=WORLD)
    by_rank = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]
    return {name: [outcomes[name] for outcomes in by_rank] for name in by_rank[0]}


def _work(rank: int, module: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD, timeout=timedelta(seconds=20)
    )
    outcomes = {}
    lost = False
    for name, case in importlib.import_module(module).CASES.items():
        outcomes[name] = "not run: the ranks lost each other in a case before" if lost else _outcome(case, rank)
        # a rank that left a case early would answer another case's sums
        lost = lost or not _all_agree(bool(outcomes[name]))
    Path(folder, f"{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


def _all_agree(failed: bool) -> bool:
    count = torch.tensor(float(failed))
    try:
        dist.all_reduce(count)
    except RuntimeError:
        return False
    return count.item() in (0, WORLD)


def _outcome(case, rank: int) -> str:
    try:
        case(rank)
    except Exception:
        return traceback.format_exc()
    return ""
