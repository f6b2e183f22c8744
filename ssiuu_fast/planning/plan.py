"""What `ssiuu-fast plan` prints: memory, where it fits, time, and what to change."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ssiuu_fast.planning.account import (
    Need,
    attribution_need,
    data_parallel_peak,
    sharded_peak,
    unlearning_need,
)
from ssiuu_fast.planning.devices import PUBLISHED, Device, measured_cpu
from ssiuu_fast.planning.dry_run import Workload
from ssiuu_fast.planning.plan_options import PlanOptions
from ssiuu_fast.planning.skeleton import Skeleton, llama_config, read_config
from ssiuu_fast.report.text import table

RUNS = ("attribution", "GD", "GD + penalty")
# what a full device is called: the driver's own memory and gaps between tensors come on top
TIGHT = 0.9
SLOWER = "1.5 to 3 times"


@dataclass(frozen=True)
class Plan:
    """The needs of the three kinds of run on one device, or on each of several."""

    options: PlanOptions
    skeleton: Skeleton
    workload: Workload
    devices: list[Device]
    needs: dict[str, Need]

    @classmethod
    def of(cls, options: PlanOptions, devices: list[Device] | None = None) -> "Plan":
        """Raises ValueError or OSError for what can't be planned, by name. devices: where they are known already."""
        devices = devices or chosen_devices(options)
        if options.model is None:
            config = llama_config(
                options.hidden_size,
                options.layers,
                options.heads,
                options.kv_heads or options.heads,
                options.intermediate_size or 16 * round(options.hidden_size / 6),
                options.vocab_size,
                tied=True,
            )
        else:
            config = read_config(options.model)
        skeleton = Skeleton(config, options.dtype)
        if skeleton.positions is not None and options.length > skeleton.positions:
            raise ValueError(f"length={options.length}: the model has {skeleton.positions} positions")
        return cls._of(options, skeleton, devices, RUNS)

    @classmethod
    def _of(cls, options: PlanOptions, skeleton: Skeleton, devices: list[Device], runs) -> "Plan":
        batch = options.batch_size // options.gpus
        workload = Workload(batch, min(options.micro_batch_size or batch, batch), options.length)
        skeleton.checkpoint(options.gradient_checkpointing)
        needs = {name: _need(name, options, skeleton, workload) for name in runs}
        return cls(options, skeleton, workload, devices, needs)

    def text(self) -> str:
        """Everything, ready to be printed."""
        parts = [self._head(), self._memory(), self._notes(), self._time()]
        if any(self._peak(need) > (device.memory or float("inf")) for device, need in self._pairs()):
            parts.append(self._changes())
        return "\n\n".join(parts)

    def _head(self) -> str:
        counts, options, workload = self.skeleton.counts, self.options, self.workload
        name = options.model or "a Llama of these sizes"
        checkpoints = ", gradient checkpointing" if options.gradient_checkpointing else ""
        return (
            f"{name} ({self.skeleton.name}): {counts.parameters:,} parameters, {sum(counts.regularized):,} of them in "
            f"{counts.modules} linear modules of the blocks, whose outputs are {counts.neurons:,} neurons\n"
            f"a step: {options.batch_size} forget rows and as many retain rows of {options.length} tokens, "
            f"{workload.rows_at_once} at once{' on each GPU' if options.gpus > 1 else ''}; weights {options.dtype}, "
            f"penalty on {options.granularity}s{checkpoints}"
        )

    def _memory(self) -> str:
        names = list(dict.fromkeys(name for need in self.needs.values() for name in need.states))
        lines = [[name, *(_gigabytes(need.states.get(name)) for need in self.needs.values())] for name in names]
        lines.append(
            ["largest phase beside them", *(_gigabytes(need.phases[need.phase]) for need in self.needs.values())]
        )
        lines.append(["  kept by one forward pass", *(_gigabytes(need.kept) for need in self.needs.values())])
        lines.append(["  gradients", *(_gigabytes(need.gradients or None) for need in self.needs.values())])
        if any(need.sums for need in self.needs.values()):
            name = "Σg and g" if self.needs[RUNS[2]].two_passes else "Σg"
            lines.append(
                [f"  {name} of micro-batches", *(_gigabytes(need.sums or None) for need in self.needs.values())]
            )
        if self.options.gpus == 1:
            lines.append(["peak", *(_gigabytes(need.peak) for need in self.needs.values())])
            lines.append(["peak, bytes", *(f"{need.peak:,}" for need in self.needs.values())])
        else:
            whole = (data_parallel_peak(need, self.skeleton) for need in self.needs.values())
            shared = (self._peak(need) for need in self.needs.values())
            lines.append(["peak of a GPU, data parallel", *map(_gigabytes, whole)])
            lines.append(["peak of a GPU, sharded", *map(_gigabytes, shared)])
        lines += [
            [f"fits {_named(device)}", *(_fits(self._peak(need), device.memory) for need in self.needs.values())]
            for device in self.devices
        ]
        return table(["memory, GB", *self.needs], lines)

    def _notes(self) -> str:
        penalised = self.needs[RUNS[2]]
        notes = [
            "GB are 10^9 bytes. The phases' parts are not all there at once; the peaks are in "
            + ", ".join(f"{name}: {need.phase}" for name, need in self.needs.items())
            + ". On a GPU its driver and gaps between tensors come on top, which is not measured yet: read 'tight' as "
            f"more than {TIGHT:.0%} of the memory."
        ]
        if penalised.host:
            notes.append(f"host memory: {_gigabytes(penalised.host)} GB while the best weights so far are renewed")
        if penalised.offloaded:
            notes.append(
                f"host memory: {_gigabytes(penalised.offloaded)} GB for references, which cross to the device and "
                "back in every step that has a penalty; the time below doesn't count that"
            )
        if self.options.gradient_checkpointing:
            notes.append("gradient checkpointing: call model.gradient_checkpointing_enable() in a loop of your own")
        if self.options.granularity == "neuron" and self.workload.split:
            notes.append("neurons with micro-batches are compared sample by sample: reference=initial")
        if penalised.two_passes:
            notes.append(f"the penalty takes a backward pass of its own: {penalised.two_passes}")
        if self.options.gpus > 1:
            notes.append(
                f"{self.options.gpus} GPUs are an estimate by formulas, not measured. 'fits' and the time are of the "
                "sharded form"
            )
        return "\n".join(notes)

    def _time(self) -> str:
        lines = []
        for device in self.devices:
            seconds = {name: self._seconds(need, device) for name, need in self.needs.items()}
            lines.append([f"{device.name}, {device.source}", *(_duration(value) for value in seconds.values())])
            if self.options.rows is not None:
                steps = {
                    RUNS[0]: -(-self.options.rows // (self.workload.rows_at_once * self.options.gpus)),
                    RUNS[1]: self._steps(),
                    RUNS[2]: self._steps(),
                }
                epoch = [_duration(steps[name] * value) for name, value in seconds.items()]
                lines.append([f"  {self.options.rows} rows", *epoch])
        heads = [f"{RUNS[0]}, a batch", f"{RUNS[1]}, a step", f"{RUNS[2]}, a step"]
        epochs = "" if self.options.rows is None else f" An epoch is {self._steps()} steps."
        return (
            table(["time, at least", *heads], lines)
            + f"\nat the limits of the device for {self.options.dtype} matrix products and its memory: at least this, "
            f"expect {SLOWER} that.{epochs}"
        )

    def _changes(self) -> str:
        """What the penalised run would need after each change that saves something."""
        before = self.needs[RUNS[2]]
        lines = []
        for words, options in _changed(self.options, self.workload):
            changed = Plan._of(options, self.skeleton, self.devices, RUNS[2:])
            need = changed.needs[RUNS[2]]
            if changed._peak(need) < self._peak(before):
                fitting = [d.name for d in self.devices if d.memory and changed._peak(need) <= d.memory]
                work = f"x {need.flops / before.flops:.2f}"
                lines.append([words, _gigabytes(changed._peak(need)), work, ", ".join(fitting) or "none of these"])
        if not lines:
            return "no option of this command makes it smaller: share the rows on several GPUs, or shorten them"
        return table([f"to make {RUNS[2]} smaller", "peak, GB", "work", "fits"], lines)

    def _pairs(self) -> Iterator[tuple[Device, Need]]:
        return ((device, need) for device in self.devices for need in self.needs.values())

    def _peak(self, need: Need) -> int:
        if self.options.gpus == 1:
            return need.peak
        return sharded_peak(need, self.skeleton, self.workload, self.options.gpus)

    def _seconds(self, need: Need, device: Device) -> float:
        return need.flops / device.flops[self.options.dtype] + need.moved / device.bandwidth

    def _steps(self) -> int:
        return -(-self.options.rows // self.options.batch_size)


def chosen_devices(options: PlanOptions) -> list[Device]:
    """The devices that the options speak of. Raises ValueError for an unknown name."""
    if options.memory is not None:
        flops = {options.dtype: options.tflops * 1e12}
        return [Device("yours", options.memory * 1e9, options.bandwidth * 1e9, flops, "as given")]
    if options.device is None:
        return list(PUBLISHED.values())
    if options.device == "cpu":
        return [measured_cpu()]
    if options.device not in PUBLISHED:
        raise ValueError(
            f"unknown device {options.device!r}: one of {', '.join(PUBLISHED)}, cpu, "
            "or give memory, bandwidth and tflops"
        )
    return [PUBLISHED[options.device]]


def _need(name: str, options: PlanOptions, skeleton: Skeleton, workload: Workload) -> Need:
    if name == RUNS[0]:
        return attribution_need(skeleton, workload)
    return unlearning_need(
        skeleton,
        workload,
        grain=options.granularity if name == RUNS[2] else None,
        state_dtype=options.state_dtype,
        offload=options.offload,
        rows=options.rows,
        on_cpu=options.device == "cpu",
        sharded=options.gpus > 1,
    )


def _changed(options: PlanOptions, workload: Workload) -> Iterator[tuple[str, PlanOptions]]:
    """One change after the other, then all of them."""
    changes: dict[str, dict] = {}
    if options.granularity == "parameter" and options.state_dtype != "8bit":
        changes["--state_dtype 8bit"] = {"state_dtype": "8bit"}
    if options.granularity == "parameter" and not options.offload and options.gpus == 1 and options.device != "cpu":
        changes["--offload true (work on the bus not counted)"] = {"offload": True}
    if workload.rows_at_once > 1:
        rows = max(1, workload.rows_at_once // 4)
        changes[f"--micro_batch_size {rows}"] = {"micro_batch_size": rows}
    if not options.gradient_checkpointing:
        changes["--gradient_checkpointing true"] = {"gradient_checkpointing": True}
    for words, change in changes.items():
        yield words, replace(options, **change)
    if len(changes) > 1:
        yield (
            "all of these",
            replace(options, **{key: value for change in changes.values() for key, value in change.items()}),
        )


def _named(device: Device) -> str:
    return device.name if device.memory is None else f"{device.name}, {device.memory / 1e9:.0f} GB"


def _fits(peak: int, memory: float | None) -> str:
    if memory is None:
        return "–"
    return "no" if peak > memory else "tight" if peak > TIGHT * memory else "yes"


def _gigabytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e9:.2f}" if value >= 1e7 else f"{value / 1e9:.4f}"


def _duration(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 90:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.2f} ms"
