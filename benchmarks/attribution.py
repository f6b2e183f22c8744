"""What does attribution of every neuron cost beside a plain forward and backward pass, in time and memory?

    python benchmarks/attribution.py [--size 110m] [--rounds 7] [--threads 2] [--json rows.json]

One batch of 8 x 128 tokens, the last 16 of each sample the answer, through a Llama of random weights: 110m (110 M
parameters, fp32) or 3b (the shape of Llama-3.2-3B, bf16, for a GPU). Contestants, with and without checkpointing:

plain       forward, and backward of the answers' log-probabilities to the embedding, weights frozen
attribute   ssiuu_fast.attribute on all linear modules: the whole public call
captum      LayerGradientXActivation on all these modules at once, and max and min over tokens of what it gives

They take turns round by round; a ratio is the median over rounds of that to plain in the same round, by the clock and,
on the CPU, by processor time, which other processes on the machine disturb less. Extra memory is the peak of what
tensors hold above that of plain, in a run of its own (of two batches for attribute, which keeps sums from one to the
next): counted storage by storage on the CPU (peak_memory.py), the allocator's peak on a GPU. captum isn't a dependency
(`pip install .[bench]`); without it its rows say so.
"""

import argparse
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peak_memory import peak_of_tensors
from rows import Row, hardware, quantiles, versions, write_rows
from stopwatch import Stopwatch, reason, release_memory

from ssiuu_fast import attribute, sequence_log_probs
from ssiuu_fast.frozen import frozen
from ssiuu_fast.sites import find_sites

TARGET = "log_probability"
ANSWER = 16
SIZES = {
    "tiny": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64),
    "110m": dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048, vocab_size=32000
    ),
    "3b": dict(
        hidden_size=3072,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=8192,
        vocab_size=128256,
    ),
}
TIME_GOAL = 1.10
# beyond the outputs that autograd doesn't keep; and, checkpointed, of what captum's way holds
MEMORY_GOAL = 0.02


@dataclass
class AttributionRow(Row):
    """A row of this benchmark. Ratios are to plain; extra and allowed memory in bytes; None where there is none."""

    seconds: tuple[float, float, float] | None
    gigabytes_per_second: float | None = None
    peak_allocation_bytes: int | None = None
    time_ratio: float | None = None
    processor_time_ratio: float | None = None
    extra_bytes: int | None = None
    allowed_extra_bytes: int | None = None
    failure: str = ""


class Setup:
    """A model and a batch, and what each contestant does with them."""

    def __init__(self, size, samples, tokens, device):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(**SIZES[size], tie_word_embeddings=True, max_position_embeddings=tokens)
        dtype = torch.bfloat16 if size == "3b" else torch.float32
        with torch.device(device):
            self.model = LlamaForCausalLM(config).to(dtype).eval()
        ids = torch.randint(1, config.vocab_size, (samples, tokens))
        answer = torch.arange(tokens) >= tokens - ANSWER
        mask = torch.ones_like(ids)
        # the last sample is shorter: padding takes part
        mask[-1, : tokens // 4] = 0
        labels = ids.masked_fill(~answer, -100)
        self.batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
        self.places = find_sites(self.model)

    def log_probs(self, input_ids, attention_mask=None, labels=None):
        attention_mask = self.batch["attention_mask"] if attention_mask is None else attention_mask
        places = (attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=places,
            use_cache=False,
            logits_to_keep=ANSWER + 1,
        ).logits
        return sequence_log_probs(logits, self.batch["labels"][:, -ANSWER - 1 :])

    def plain(self):
        embedded = []

        def keep(module, inputs, output):
            embedded.append(output.requires_grad_())

        handle = self.model.get_input_embeddings().register_forward_hook(keep)
        try:
            with frozen(self.model):
                torch.autograd.grad(self.log_probs(self.batch["input_ids"]).sum(), embedded)
        finally:
            handle.remove()

    def attribute(self, batches=1):
        return attribute(self.model, [self.batch] * batches, target=TARGET)

    def captum(self):
        from captum.attr import LayerGradientXActivation

        with frozen(self.model):
            handle = self.model.get_input_embeddings().register_forward_hook(
                lambda m, i, output: output.requires_grad_()
            )
            try:
                layers = [place.module for place in self.places.values()]
                found = LayerGradientXActivation(self.log_probs, layers).attribute(self.batch["input_ids"])
            finally:
                handle.remove()
            left_out = (self.batch["attention_mask"] == 0)[..., None]
            return {
                site: (
                    values.masked_fill(left_out, -torch.inf).amax(1).mean(0),
                    values.masked_fill(left_out, torch.inf).amin(1).mean(0),
                )
                for site, values in zip(self.places, found, strict=True)
            }

    def checkpoint(self, on):
        if on:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        elif self.model.is_gradient_checkpointing:
            self.model.gradient_checkpointing_disable()


def outputs_not_kept(setup):
    """Bytes of the tapped outputs that a plain pass doesn't keep for its backward, and the kinds of their modules."""
    kept, outputs = set(), {}

    def pack(tensor):
        kept.add(tensor.untyped_storage()._cdata)
        return tensor

    handles = [
        place.module.register_forward_hook(lambda module, inputs, output, site=site: outputs.__setitem__(site, output))
        for site, place in setup.places.items()
    ]
    try:
        # all outputs live until both are known, so that no two share an address
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            setup.plain()
    finally:
        for handle in handles:
            handle.remove()
    storages = {site: output.untyped_storage() for site, output in outputs.items()}
    missing = {site: storage.nbytes() for site, storage in storages.items() if storage._cdata not in kept}
    return sum(missing.values()), sorted({site.kind for site in missing})


def disagreement(setup):
    """Largest difference between attribute and captum, as a share of a site's largest value."""
    mine, theirs = setup.attribute(), setup.captum()
    worst = 0.0
    for site, pair in theirs.items():
        for a, b in zip((mine.max[site], mine.min[site]), pair, strict=True):
            b = b.cpu().float()
            worst = max(worst, ((a - b).abs().max() / b.abs().max()).item())
    return worst


def missing_captum():
    try:
        import captum.attr  # noqa: F401
    except ImportError as error:
        return f"not importable: {error}"
    return ""


def race(setup, stopwatch, rounds):
    """{(contestant, checkpointed): ([seconds], [processor seconds])} and what failed."""
    contestants = {"plain": setup.plain, "attribute": setup.attribute, "captum": setup.captum}
    failures = {"captum": missing_captum()} if missing_captum() else {}
    times = {(name, checkpointed): ([], []) for checkpointed in (False, True) for name in contestants}
    for turn in range(rounds + 1):
        for name, checkpointed in times:
            if name in failures:
                continue
            setup.checkpoint(checkpointed)
            used = time.process_time()
            try:
                seconds = stopwatch.call_time(contestants[name])
            except Exception as error:
                failures[name] = reason(error)
                release_memory()
                continue
            # the first turn warms up
            if turn:
                times[name, checkpointed][0].append(seconds)
                times[name, checkpointed][1].append(time.process_time() - used)
    return times, failures


def measure(size, samples, tokens, rounds, device):
    setup = Setup(size, samples, tokens, device)
    unkept, kinds = outputs_not_kept(setup)
    times, failures = race(setup, Stopwatch(device), rounds)
    parameters = sum(p.numel() for p in setup.model.parameters())
    neurons = sum(len(values) for values in attribute(setup.model, [setup.batch], target=TARGET).max.values())
    print(
        f"{parameters / 1e6:.0f} M parameters, {neurons} neurons, {samples} x {tokens} tokens; "
        f"outputs autograd doesn't keep ({', '.join(kinds)}): {unkept / 1e6:.1f} MB"
    )
    rows, peaks = [], {}
    for name, checkpointed in times:
        case = f"{size} {samples}x{tokens}{' checkpointed' if checkpointed else ''}"
        if name in failures:
            rows.append(AttributionRow("attribution", case, name, None, rounds, failure=failures[name]))
            continue
        setup.checkpoint(checkpointed)
        # two batches: at the second one the means of the first are there
        call = (lambda: setup.attribute(2)) if name == "attribute" else getattr(setup, name)
        peaks[name, checkpointed] = peak_of_tensors(call, device)
        row = AttributionRow("attribution", case, name, quantiles(times[name, checkpointed][0]), rounds)
        row.peak_allocation_bytes = peaks[name, checkpointed]
        row.extra_bytes = peaks[name, checkpointed] - peaks["plain", checkpointed]
        clock, processor = (
            statistics.median(a / b for a, b in zip(mine, plain, strict=True))
            for mine, plain in zip(times[name, checkpointed], times["plain", checkpointed], strict=True)
        )
        row.time_ratio = clock
        row.processor_time_ratio = processor if device.type == "cpu" else None
        rows.append(row)
    setup.checkpoint(False)
    for row in rows:
        if row.contestant == "attribute":
            checkpointed = row.case.endswith("checkpointed")
            # captum holds every output and its gradient; where it isn't there, that is what it would hold
            row.allowed_extra_bytes = int(
                MEMORY_GOAL * held_by_captum(setup, peaks) if checkpointed else (1 + MEMORY_GOAL) * unkept
            )
    worst = None if "captum" in failures else disagreement(setup)
    return rows, worst


def held_by_captum(setup, peaks):
    if ("captum", True) in peaks:
        return peaks["captum", True] - peaks["plain", True]
    tokens = setup.batch["input_ids"].numel()
    size = next(setup.model.parameters()).element_size()
    neurons = sum(place.module.out_features for place in setup.places.values())
    return 2 * neurons * tokens * size


def table(rows):
    heads = ("median s", "10-90 %", "x plain", "x (proc.)", "peak MB", "extra MB")
    print(f"\n{'':26}{''.join(f'{head:>14}' for head in heads)}")
    for row in rows:
        label = f"{row.contestant}{', checkpointed' if row.case.endswith('checkpointed') else ''}"
        if row.failure:
            print(f"{label:26}  {row.failure}")
            continue
        low, median, high = row.seconds
        processor = f"{row.processor_time_ratio:.3f}" if row.processor_time_ratio else "-"
        print(
            f"{label:26}{median:14.3f}{f'{low:.2f}-{high:.2f}':>14}{row.time_ratio:14.3f}{processor:>14}"
            f"{row.peak_allocation_bytes / 1e6:14.1f}{row.extra_bytes / 1e6:14.2f}"
        )


def goals(rows, worst):
    """Print each goal, and whether it was met."""
    print()
    for row in rows:
        if row.contestant != "attribute" or row.failure:
            continue
        what = "checkpointed: " if row.case.endswith("checkpointed") else ""
        for ratio, by in ((row.time_ratio, "the clock"), (row.processor_time_ratio, "processor time")):
            if ratio is not None:
                verdict(f"{what}{ratio:.3f} x plain by {by}, goal {TIME_GOAL:.2f}", ratio <= TIME_GOAL)
        of = "2 % of what captum holds" if what else "outputs autograd doesn't keep + 2 %"
        verdict(
            f"{what}extra memory {row.extra_bytes / 1e6:.2f} MB, goal {row.allowed_extra_bytes / 1e6:.2f} MB ({of})",
            row.extra_bytes <= row.allowed_extra_bytes,
        )
    if worst is None:
        print("  not seen  agreement with captum")
    else:
        verdict(f"agreement with captum: {worst:.1e} of a site's largest value, goal 1e-6", worst <= 1e-6)


def verdict(text, met):
    print(f"  {'met' if met else 'MISSED':8}  {text}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="110m")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args(arguments)
    # names that transformers renames in version 6; the new ones aren't in all of version 5
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{hardware()}, {args.threads} threads"
    print(f"{where}; {', '.join(f'{name} {version}' for name, version in versions().items())}; {args.rounds} rounds")
    rows, worst = measure(args.size, args.samples, args.tokens, args.rounds, device)
    table(rows)
    goals(rows, worst)
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    sys.exit(main())
