"""What does a whole unlearning step cost with the penalty, in time and peak memory, beside GD alone?

    python benchmarks/step.py [--size 100m] [--batch 4] [--length 128] [--contestants gd "one backward" ...]
    python benchmarks/step.py --scaling      against parameters, tokens, and number of tensors, with straight lines
    python benchmarks/step.py --largest      the deepest model that fits (GPU)
    python benchmarks/step.py --limits       matrix products and copies here, and the least time they allow a step
    python benchmarks/step.py --quick        a tiny model, to see that this program works

A step: forget rows forward and back, penalty, retain rows forward and back, AdamW, zero_grad; a Llama of random
weights. Cases: noskip, where every forget row takes part in the penalty (answers of 2 tokens: P is about 1/V^2), for
each target, since with log_probability all rows of GD weigh the same and the road of one backward pass needs no further
product; and skip, where none does (answers of 64 tokens: P = 0 in fp32). No ratio is given where the rows aren't those
of the case.

Every contestant has a process of its own, in which it and GD alone take turns, round by round, on the same weights. A
ratio is the median over rounds of that to GD in the same round; the row `gd` is GD against itself, and shows the noise.
R of the second step is compared with that of a transcription of Algorithm 1, and a contestant that differs isn't timed.
The learning rate is 0 (step_case.py). On the CPU the peak is that of resident memory, in another process whose freed
memory goes back to the system at once; on a GPU what the allocator counts. Contestants: step_contestants.py.
"""

import argparse
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rows import hardware, versions, write_rows
from step_case import LONG, SHORT, SIZES, Case
from step_contestants import CONTESTANTS
from step_report import goals, table
from step_run import Plan, measure

from ssiuu_fast.targets import TARGETS

RESULTS = Path(__file__).parent / "results"
NAMES = tuple(CONTESTANTS)
ANSWERS = {"short": SHORT, "long": LONG}


def cases_of(args) -> list[Case]:
    common = {"size": args.size, "dtype": args.dtype, "batch": args.batch, "device": args.device}
    common |= {"threads": args.threads}
    found = []
    for regime in args.case:
        answer = args.answers or ("short" if regime == "noskip" else "long")
        tokens = ANSWERS[answer] if answer in ANSWERS else int(answer)
        # under the other targets nothing underflows
        targets = args.target if regime == "noskip" else ["probability"]
        for target in targets:
            for length in args.length:
                for count in args.micro_batches:
                    about = {"length": length, "micro_batches": count, "answer_tokens": tokens}
                    found.append(Case(**common, **about, target=target, regime=regime))
    return found


def where_of(args) -> str:
    if args.device == "cuda":
        # asked of the driver: this process makes no context of its own, which would take memory
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True
        )
        return said.stdout.strip().splitlines()[0] if said.stdout.strip() else "cuda"
    return f"{hardware()}, {args.threads} threads"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def file_of(args, kind: str = "") -> Path:
    """Of results, without its suffix."""
    device = slug(where_of(args)) if args.device == "cuda" else "cpu"
    size = "" if kind in ("scaling", "largest") else slug(args.size)
    return args.out / (args.name or "_".join(part for part in ("step", kind, device, size, args.dtype) if part))


def arguments_of(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_mutually_exclusive_group()
    for kind in ("scaling", "largest", "limits"):
        kinds.add_argument(f"--{kind}", action="store_true", help="see above")
    parser.add_argument("--quick", action="store_true", help="see above; peaks then mean nothing")
    parser.add_argument("--contestants", nargs="+", choices=NAMES, help="default: all; gd too, unless --no_peak")
    parser.add_argument("--size", choices=SIZES, help="default: 100m, 3b on a GPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32, bfloat16 on a GPU")
    parser.add_argument("--batch", type=int, help="forget rows, and as many retain rows; default: 4, 8 on a GPU")
    parser.add_argument("--length", type=int, nargs="+", help="tokens of a row; default: 128, 256 on a GPU")
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[1])
    parser.add_argument("--case", nargs="+", choices=("noskip", "skip"), default=["noskip", "skip"])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=["probability", "log_probability"])
    parser.add_argument("--answers", help="short (2 tokens), long (64), or a number; default: by the case")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds after which a process is stopped")
    parser.add_argument("--no_peak", action="store_true", help="no memory")
    parser.add_argument("--no_time", action="store_true", help="no times")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of rows and figures")
    parser.add_argument("--name", help="of the files, without suffix")
    args = parser.parse_args(arguments)
    fill(args)
    if args.answers and args.answers not in ANSWERS and not args.answers.isdecimal():
        parser.error(f"--answers is short, long or a number of tokens, not {args.answers!r}")
    if args.scaling or args.largest or args.limits:
        # of one case
        args.case, args.target = args.case[:1], args.target[:1]
    try:
        args.cases = cases_of(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def fill(args) -> None:
    """Defaults that depend on where this runs."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = args.device == "cuda"
    args.size = args.size or ("tiny" if args.quick else "3b" if on_gpu else "100m")
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    args.batch = args.batch or (8 if on_gpu else 4)
    args.length = args.length or [256 if on_gpu else 128]
    args.chosen = bool(args.contestants)
    args.contestants = args.contestants or list(NAMES[:5] if args.quick else NAMES)
    if not (args.chosen and args.no_peak):
        # peaks are above its
        args.contestants = ["gd", *args.contestants]
    # in the order of the table
    args.contestants = [name for name in NAMES if name in args.contestants]


def compare(cases: list[Case], names: list[str], plan: Plan, file: Path) -> None:
    from step_figures import time_against_memory

    rows, judged = [], []
    for case in cases:
        measured = measure(case, names, plan)
        table(measured)
        judged += goals(case, measured)
        rows += measured
        # after every case, so that a run that is stopped keeps what it has
        write_rows(file.with_suffix(".json"), rows)
        if plan.peak and plan.time:
            about = f"{case.regime}_{case.target}_{case.length}_{case.micro_batches}"
            time_against_memory(file.with_name(f"{file.name}_{about}.png"), measured)
    print("\nGoals:\n" + "\n".join(map(str, judged)) + f"\n\nRows in {file.with_suffix('.json')}")


def main(arguments=None):
    args = arguments_of(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    where, cases = where_of(args), args.cases
    names = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"{where}; {names}; {args.rounds} rounds", flush=True)
    plan = Plan(args.rounds, args.limit, time=not args.no_time, peak=not args.no_peak, quick=args.quick)
    if args.scaling:
        from step_scaling import scaling

        # all contestants would take hours
        chosen = [name for name in args.contestants if name != "gd"] if args.chosen else ["one backward"]
        scaling(cases[0], chosen, replace(plan, peak=False), file_of(args, "scaling"))
    elif args.largest:
        from step_largest import DEFAULT, largest

        largest(cases[0], args.contestants if args.chosen else DEFAULT, plan, file_of(args, "largest"))
    elif args.limits:
        from step_limits import limits

        limits(cases[0], args.rounds, where, file_of(args, "limits"))
    else:
        compare(cases, args.contestants, plan, file_of(args))


if __name__ == "__main__":
    sys.exit(main())
