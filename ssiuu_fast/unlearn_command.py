"""`ssiuu-fast unlearn`: a run of UnlearningTrainer, on one or many processes, in a folder it can be resumed from."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import TrainerCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from ssiuu_fast import adapters, models
from ssiuu_fast.data.collate import Encoder
from ssiuu_fast.data.example import Example, refuse_overlap
from ssiuu_fast.data.refusals import DEFAULT_REFUSAL, load_refusals
from ssiuu_fast.data.sources import load_examples
from ssiuu_fast.evaluation import scores
from ssiuu_fast.experiment import carry_teaching
from ssiuu_fast.loading import encoder_of
from ssiuu_fast.loop.callbacks import show
from ssiuu_fast.methods import PENALTY, Method
from ssiuu_fast.methods import method as method_named
from ssiuu_fast.objectives import OBJECTIVES
from ssiuu_fast.ranks import Ranks
from ssiuu_fast.report.text import table
from ssiuu_fast.runs import MODEL_FOLDER, RunFolder
from ssiuu_fast.sampling import number_of_micro_batches, refuse_empty_micro_batches, steps_per_epoch
from ssiuu_fast.trainer import UnlearningTrainer
from ssiuu_fast.trainer_config import UnlearningConfig, refuse_deepspeed
from ssiuu_fast.unlearn_options import UnlearnOptions

CHECKPOINTS, STEPS, BEFORE, RESULTS = "checkpoints", "steps.jsonl", "before.json", "results.json"


def unlearn(options: UnlearnOptions) -> None:
    """Unlearn rows of your own from a model, with an early stop at the forget threshold.

    On several GPUs with a copy of the model on each: `torchrun --nproc-per-node 8 -m ssiuu_fast unlearn …`. With the
    model sharded over them (FSDP2): `accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2
    --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP -m ssiuu_fast unlearn …`, or with a file of `accelerate config` in
    place of these flags.
    """
    run, resume = None, options.resume is not None
    if resume:
        run, chosen = RunFolder.stopped(options.resume, "unlearn")
        if run.file(RESULTS).exists():
            raise ValueError(f"{run.path} is of a run that is finished: its figures are in {RESULTS}")
        options = UnlearnOptions(**chosen)
    refuse_deepspeed()
    # the processes of torchrun or accelerate launch find each other
    PartialState(cpu=options.device == "cpu")
    ranks = Ranks()
    record = _Record()
    with ranks.failing_together(), tempfile.TemporaryDirectory() as nowhere:
        # the Trainer makes its folder when it is made; the run's is made when nothing is wrong any more
        asked = _asked(options)
        trainer = _trainer(asked, options, ranks, nowhere, record)
    with ranks.failing_together():
        if run is None and ranks.rank == 0:
            resolved = {"method": asked.method.name, "threshold": asked.threshold}
            run = RunFolder.create(options.output, "unlearn", asdict(options) | resolved)
    record.run = run = RunFolder(Path(ranks.gather(None if run is None else str(run.path))[0]))
    record.score = partial(_score, trainer.encoder, asked.kept)
    trainer.args.output_dir = str(run.file(CHECKPOINTS))
    show(trainer, asked.method.name)
    # one for every file of a checkpoint
    disable_progress_bar()
    try:
        results = _train(trainer, record, resume=resume)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"go on with: ssiuu-fast unlearn --resume {run.path}") from None
    if ranks.rank == 0:
        _finish(results, asked, options, run)
    if ranks.size > 1:
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class _Asked:
    """What options ask for, beside the model. kept: the rows that RS is of."""

    method: Method
    forget: list[Example]
    retain: list[Example] | None
    kept: list[Example] | None
    refusals: list[str] | None
    threshold: float

    @property
    def sets(self) -> dict[str, list[Example]]:
        """The rows that steps are drawn from."""
        needs_retain = OBJECTIVES[self.method.objective].needs_retain
        return {"forget": self.forget} | ({"retain": self.retain} if needs_retain else {})


def _asked(options: UnlearnOptions) -> _Asked:
    forget = load_examples(options.forget)
    retain = load_examples(options.retain) if options.retain else None
    kept = load_examples(options.test) if options.test else retain
    method = _method(options.method, retain)
    if retain is not None:
        refuse_overlap(forget, retain, options.forget, options.retain)
    if options.test:
        refuse_overlap(forget, kept, options.forget, options.test)
    refusals = None
    if OBJECTIVES[method.objective].needs_refusals:
        refusals = load_refusals(options.refusals) if options.refusals else [DEFAULT_REFUSAL]
    threshold = options.threshold
    if threshold is None:
        threshold = scores.default_threshold(forget)
        print(f"threshold: {threshold:.4f}, the score of a model that has these rows mixed up or guesses")
    return _Asked(method, forget, retain, kept, refusals, threshold)


def _method(asked: str | None, retain: list[Example] | None) -> Method:
    if asked is None and retain is None:
        print("no retain rows were given, so there is nothing to hold the model together: unlearning by GA alone")
        return method_named("ga")
    method = method_named(asked or PENALTY)
    if retain is None and OBJECTIVES[method.objective].needs_retain:
        raise ValueError(f"method {asked} needs retain rows: give --retain FILE, or use --method ga")
    return method


def _trainer(
    asked: _Asked, options: UnlearnOptions, ranks: Ranks, folder: str, record: TrainerCallback
) -> UnlearningTrainer:
    config = _config(asked, options, ranks, folder)
    model, encoder = _load(options, config)
    for row in [*asked.forget, *(asked.retain or []), *(asked.kept or [])]:
        encoder.encode(row)
    config.style, config.max_length = encoder.style, encoder.max_length
    return UnlearningTrainer(
        model,
        config,
        **asked.sets,
        refusals=asked.refusals,
        processing_class=encoder.tokenizer,
        callbacks=[record],
    )


def _config(asked: _Asked, options: UnlearnOptions, ranks: Ranks, folder: str) -> UnlearningConfig:
    """Raises ValueError for what can't work together, before the model is loaded."""
    if options.batch_size % ranks.size:
        raise ValueError(
            f"batch_size={options.batch_size} must be a multiple of the {ranks.size} processes that share it"
        )
    rows_of_rank = options.batch_size // ranks.size
    micro_batches = number_of_micro_batches(rows_of_rank, options.micro_batch_size)
    whole_batch = asked.method.penalised and (options.granularity, options.reference) == ("neuron", "previous")
    if whole_batch and micro_batches > 1:
        raise ValueError(
            "micro_batch_size: with granularity=neuron and reference=previous an attribution is a sum over the "
            "whole batch. Leave micro_batch_size out, or use reference=initial"
        )
    refuse_empty_micro_batches(options.batch_size, options.micro_batch_size, asked.sets, ranks.size)
    penalty = (
        "weight", "relative_weight", "target", "granularity", "reference", "one_sided", "every", "state_dtype",
        "offload",
    )  # fmt: skip
    config = UnlearningConfig(
        output_dir=folder,
        objective=asked.method.objective,
        objective_options=options.objective_options,
        regularize=asked.method.penalised,
        **{name: getattr(options, name) for name in penalty},
        learning_rate=options.learning_rate,
        threshold=asked.threshold,
        num_train_epochs=options.max_epochs,
        per_device_train_batch_size=rows_of_rank // micro_batches,
        gradient_accumulation_steps=micro_batches,
        style=options.style,
        max_length=options.max_length,
        reference_cache=options.reference_cache,
        seed=options.seed,
        save_strategy="steps" if options.save_every else "no",
        save_steps=max(options.save_every, 1) * steps_per_epoch(len(asked.forget), options.batch_size),
        save_total_limit=1,
        use_cpu=options.device == "cpu",
        report_to="none",
    )
    _refuse_device(options.device, config)
    return config


def _refuse_device(name: str | None, config: UnlearningConfig) -> None:
    asked = models.default_device(name)
    if asked.index:
        raise ValueError(
            f"device={name}: a run takes the first GPU it sees, set CUDA_VISIBLE_DEVICES={asked.index} and say cuda"
        )
    if name is not None and asked.type != config.device.type:
        raise ValueError(f"device={name}: there is none here, only {config.device.type}")


def _load(options: UnlearnOptions, config: UnlearningConfig):
    """The model with what is to be trained requiring grad: all of it, or the adapters that it has or gets."""
    if options.load_in_4bit and options.lora_rank is None and adapters.find_adapter(options.model) is None:
        raise ValueError("load_in_4bit: weights in 4 bits can't be trained, give lora_rank too")
    # a model to be sharded may be larger than the GPU
    device = "cpu" if config.sharded else config.device
    dtype = getattr(torch, options.dtype)
    model, tokenizer = models.load(options.model, dtype=dtype, device=device, load_in_4bit=options.load_in_4bit)
    encoder = encoder_of(model, tokenizer, options.style, options.max_length)
    if options.lora_rank is not None:
        # adapters start at random numbers, the same in every process
        set_seed(options.seed)
        model = adapters.add_lora(
            model,
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            targets=options.lora_targets,
            dropout=options.lora_dropout,
        )
    if options.gradient_checkpointing:
        models.checkpoint_blocks(model)
    return model, encoder


def _score(encoder: Encoder, rows: Sequence[Example] | None, model) -> float | None:
    return None if rows is None else scores.score(model, encoder, rows).mean


class _Record(TrainerCallback):
    """What a run writes while it goes on: its log, and before the first step the score of the rows to keep.

    run, score: set before the training; score(model) is None where there is nothing to score.
    """

    run: RunFolder
    score: Callable[..., float | None]

    def on_train_begin(self, args, state, control, model, **kwargs):
        before = self.score(model) if state.global_step == 0 else None
        if state.is_world_process_zero:
            if state.global_step == 0:
                self.run.write_json(BEFORE, {"RS": before})
            # what a stopped run logged after its last checkpoint is done again
            self.run.file(STEPS).unlink(missing_ok=True)
            for row in state.log_history:
                self.run.log(STEPS, row)

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.run.log(STEPS, state.log_history[-1])


def _train(trainer: UnlearningTrainer, record: _Record, *, resume: bool) -> dict:
    """Trains, from the last checkpoint where there is one, and saves the model; returns the run's results."""
    run = record.run
    checkpointed = resume and any(run.file(CHECKPOINTS).glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=checkpointed or None)
    progress = trainer.progress()
    before = {"FS": progress.scores[0] if progress.scores else None} | run.read_json(BEFORE)
    after = {"FS": progress.score, "RS": record.score(trainer.model)}
    _save(trainer, run.file(MODEL_FOLDER))
    return {"before": before, "after": after, "unlearning": progress.as_dict()}


def _save(trainer: UnlearningTrainer, folder: Path) -> None:
    gathered = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        models.save(trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class, folder, gathered)


def _finish(results: dict, asked: _Asked, options: UnlearnOptions, run: RunFolder) -> None:
    """On one process: the results in the folder and on the screen; the checkpoints have done their work."""
    carry_teaching(options.model, run.file(MODEL_FOLDER))
    run.write_json(RESULTS, results)
    run.file(BEFORE).unlink()
    shutil.rmtree(run.file(CHECKPOINTS), ignore_errors=True)
    done = results["unlearning"]
    lines = [
        [name, *map(_number, results[key].values())] for name, key in (("before",) * 2, (asked.method.name, "after"))
    ]
    print(table(["", "FS", "RS"], lines))
    print(
        "FS: forget rows. RS: "
        + ("held-out rows." if options.test else "retain rows, which the run trained on." if options.retain else "–")
    )
    print(f"{done['steps']} steps, {done['epochs']} epochs, stopped by {done['stopped_by']}")
    if asked.method.penalised:
        share = done["penalty_share"]
        known = "" if share is None else f"; over the penalised steps it was {share:.1%} of the gradient on average"
        print(f"λ {_number(done['weight'])}{known}")
    for note in done["notes"]:
        print(f"note: {note}")
    print(f"model: {run.file(MODEL_FOLDER)}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
