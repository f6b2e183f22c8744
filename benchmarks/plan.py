"""Does `ssiuu-fast plan` tell the memory that a run then takes?

    python benchmarks/plan.py [--case NAME] [--json rows.json]

Each case runs for real in a process of its own: `unlearn` for three steps with the copies of the best weights that it
keeps, or `attribute` on one batch. Rows have mixed lengths, so that padding masks exist. The measured peak is that of
the process's resident memory (Linux: VmHWM, reset after everything was imported and one step of a tiny model was run)
less what was resident then. Freed memory goes back to the system at once (MALLOC_MMAP_THRESHOLD_), so that the peak
holds nothing but what was alive, inside operators too: nothing here shares code with the count that plan makes.
"""

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rows import hardware, now, versions

TOLERANCE = 0.10
THREADS = 2
TINY = {"hidden_size": 64, "layers": 2, "heads": 2, "kv_heads": 2, "intermediate_size": 128, "vocab_size": 512}
MIDDLE = {"hidden_size": 384, "layers": 8, "heads": 6, "kv_heads": 6, "intermediate_size": 1024, "vocab_size": 16384}
LARGE = {"hidden_size": 768, "layers": 12, "heads": 12, "kv_heads": 4, "intermediate_size": 2048, "vocab_size": 32000}


@dataclass(frozen=True)
class Case:
    """What runs: "attribution", or "unlearning" with the penalty at a grain, or without (None)."""

    shape: dict
    run: str
    batch_size: int
    length: int
    micro_batch_size: int | None = None
    grain: str | None = None
    state_dtype: str | None = None
    checkpointing: bool = False


CASES = {
    "20 M, unlearning by GD": Case(MIDDLE, "unlearning", 16, 128),
    "20 M, neurons, checkpointing": Case(MIDDLE, "unlearning", 16, 256, grain="neuron", checkpointing=True),
    "20 M, parameters, 8-bit references": Case(MIDDLE, "unlearning", 16, 128, grain="parameter", state_dtype="8bit"),
    "100 M, unlearning by GD, 2 micro-batches": Case(LARGE, "unlearning", 8, 128, micro_batch_size=4),
    "100 M, parameters, fp32, 2 micro-batches": Case(
        LARGE, "unlearning", 8, 128, micro_batch_size=4, grain="parameter", state_dtype="float32"
    ),
    "100 M, attribution": Case(LARGE, "attribution", 8, 256),
    "100 M, attribution, checkpointing": Case(LARGE, "attribution", 8, 256, checkpointing=True),
}


@dataclass
class PlanRow:
    """Bytes planned and measured; parameters in elements."""

    case: str
    parameters: int
    planned_bytes: int
    measured_bytes: int
    phase: str
    threads: int = THREADS
    hardware: str = field(default_factory=hardware)
    versions: dict[str, str] = field(default_factory=versions)
    timestamp: str = field(default_factory=now)

    @property
    def ratio(self) -> float:
        return self.planned_bytes / self.measured_bytes


def planned(case):
    from ssiuu_fast.planning.account import attribution_need, unlearning_need
    from ssiuu_fast.planning.dry_run import Workload
    from ssiuu_fast.planning.skeleton import Skeleton

    skeleton = Skeleton(_config(case.shape))
    skeleton.checkpoint(case.checkpointing)
    workload = Workload(case.batch_size, case.micro_batch_size or case.batch_size, case.length)
    if case.run == "attribution":
        need = attribution_need(skeleton, workload)
    else:
        need = unlearning_need(skeleton, workload, grain=case.grain, state_dtype=case.state_dtype, on_cpu=True)
    return need, skeleton.counts.parameters


def run(case):
    """The real thing, in this process."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(_config(case.shape))
    if case.checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if case.run == "attribution":
        _attribute(model, case)
    else:
        _unlearn(model, case)


def measure(case):
    """Bytes by which resident memory's peak rises over what was there; in a process of its own."""
    torch.set_num_threads(THREADS)
    warm_up = {name: getattr(case, name) for name in ("run", "grain", "state_dtype", "checkpointing")}
    run(Case(TINY, batch_size=4, length=16, micro_batch_size=case.micro_batch_size and 2, **warm_up))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run(case)
    return _resident("VmHWM") - before


def _config(shape):
    from ssiuu_fast.planning.skeleton import llama_config

    return llama_config(**shape, tied=True)


def _unlearn(model, case):
    from ssiuu_fast.data.collate import Encoded
    from ssiuu_fast.trainer import UnlearningTrainer
    from ssiuu_fast.trainer_config import UnlearningConfig

    penalty = {}
    if case.grain is not None:
        penalty = {
            "weight": 1e-3,
            # rows that differ, so that g takes a product of its own
            "target": "mean_token_probability",
            "granularity": case.grain,
            "state_dtype": case.state_dtype,
        }
    forget, retain = ([Encoded(ids, labels) for ids, labels in _rows(case, seed)] for seed in (0, 1))
    scores = iter((1.0, 0.9, 0.8, 0.7))
    micro_batches = 1 if case.micro_batch_size is None else case.batch_size // case.micro_batch_size
    with tempfile.TemporaryDirectory() as folder:
        config = UnlearningConfig(
            output_dir=folder,
            regularize=case.grain is not None,
            **penalty,
            threshold=0.0,
            num_train_epochs=3,
            per_device_train_batch_size=case.batch_size // micro_batches,
            gradient_accumulation_steps=micro_batches,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        )
        run = UnlearningTrainer(model, config, forget=forget, retain=retain, forget_score=lambda model: next(scores))
        run.train()


def _attribute(model, case):
    from ssiuu_fast.attribution import attribute
    from ssiuu_fast.data.collate import Encoded, collate

    rows = [Encoded(ids, labels) for ids, labels in _rows(case)]
    attribute(model, [collate(rows)] * 2)


def _rows(case, seed=0):
    """Rows of which every other one is full; all but the first token is the answer."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(case.batch_size):
        length = case.length - (number % 2) * (case.length // 4)
        ids = torch.randint(3, case.shape["vocab_size"], (length,), generator=generator).tolist()
        yield ids, [-100, *ids[1:]]


def _resident(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) * 1024


def compare(name, case):
    need, parameters = planned(case)
    # what is freed goes back at once, whatever its size from 64 kB on
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    # threads that wait in a busy loop stall a run where the cores are shared
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | settings
    command = [sys.executable, __file__, "--measure", json.dumps(asdict(case))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()[-2000:]}")
    return PlanRow(name, parameters, need.peak, int(done.stdout.split()[-1]), need.phase)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="only this one")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(measure(Case(**json.loads(args.measure))))
        return
    print(f"{hardware()}, {THREADS} threads; {', '.join(f'{name} {version}' for name, version in versions().items())}")
    print(f"{'':42}{'M params':>10}{'plan MB':>10}{'measured':>10}{'ratio':>8}  peak in")
    rows = []
    for name in [args.case] if args.case else CASES:
        row = compare(name, CASES[name])
        figures = f"{row.parameters / 1e6:10.1f}{row.planned_bytes / 1e6:10.1f}{row.measured_bytes / 1e6:10.1f}"
        print(f"{name:42}{figures}{row.ratio:8.3f}  {row.phase}", flush=True)
        rows.append(row)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) | {"ratio": row.ratio} for row in rows], indent=2) + "\n")
    if any(abs(row.ratio - 1) > TOLERANCE for row in rows):
        sys.exit(f"not all within {TOLERANCE:.0%}")


if __name__ == "__main__":
    main()
