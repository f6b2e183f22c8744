"""The commands of `ssiuu-fast`. cli.py reads the flags, options.py explains them, this does the work."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from ssiuu_fast import adapters, models
from ssiuu_fast.compare import run_sweep
from ssiuu_fast.compare_setting import PUBLISHED_TEACHING_RATE, setting
from ssiuu_fast.data.collate import Encoder
from ssiuu_fast.data.example import Example, refuse_overlap
from ssiuu_fast.data.sources import load_examples, load_instructions
from ssiuu_fast.demo import run_demo
from ssiuu_fast.evaluation import scores
from ssiuu_fast.evaluation.attacks import Attack, benign_attack, harmful_attack
from ssiuu_fast.experiment import (
    PEOPLE,
    TAUGHT,
    TEACHING_FILE,
    TOFU,
    Recipe,
    Task,
    memorised_in,
    noted_teaching_rate,
    people_task,
    small_llama,
    teach,
    tofu_task,
)
from ssiuu_fast.influence_study import notes_on_options, study, with_options
from ssiuu_fast.options import (
    AttackOptions,
    CompareOptions,
    DemoOptions,
    EvaluateOptions,
    InfluenceOptions,
    MemorizeOptions,
    PlanOptions,
    UnlearnOptions,
)
from ssiuu_fast.planning.plan import Plan
from ssiuu_fast.planning.skeleton import read_config
from ssiuu_fast.report.influence_page import study_text, write_page
from ssiuu_fast.report.text import mean_sd, table
from ssiuu_fast.runs import RunFolder
from ssiuu_fast.scoring import prepare
from ssiuu_fast.unlearning import unlearn

MODEL_FOLDER = "model"


def demo(options: DemoOptions) -> None:
    """Unlearn people by GD and by Ssiuu, attack both by retraining, and read which one erased."""
    if options.resume is not None:
        run, chosen = _stopped(options.resume, "demo")
        options = DemoOptions(**chosen)
        task, _ = _demo_setting(options)
        recipe = Recipe(**run.read_json("recipe.json"))
    else:
        task, recipe = _demo_setting(options)
        run = RunFolder.create(options.output, "demo", asdict(options))
        run.write_json("recipe.json", asdict(recipe))
    run_demo(task, recipe, options.seeds, run)


def memorize(options: MemorizeOptions) -> None:
    """Train a model to know a data set, so that there is something to unlearn."""
    rows = load_examples(options.data)
    if options.model is None:
        model, tokenizer = small_llama(
            rows,
            vocab_size=options.vocab_size,
            hidden_size=options.hidden_size,
            layers=options.layers,
            heads=options.heads,
            max_positions=options.max_length,
            seed=options.seed,
        )
    else:
        # in fp32 whatever the checkpoint's: 16-bit weights lose most updates
        model, tokenizer = models.load(options.model, dtype=torch.float32)
    model.to(models.default_device(options.device))
    encoder = _encoder(model, tokenizer, "auto", options.max_length)
    for row in rows:
        encoder.encode(row)
    run = RunFolder.create(options.output, "memorize", asdict(options))
    taught = teach(
        model,
        encoder,
        rows,
        rows,
        learning_rate=options.learning_rate,
        epochs=options.epochs,
        batch_size=options.batch_size,
        known_at=options.stop_at,
        seed=options.seed,
        progress=True,
    )
    models.save(model, tokenizer, run.file(MODEL_FOLDER))
    run.write_json(f"{MODEL_FOLDER}/{TEACHING_FILE}", taught)
    run.write_json("results.json", taught)
    print(table(["memorised", "score", "epochs"], [[options.data, f"{taught['score']:.3f}", str(taught["epochs"])]]))
    if taught["score"] < options.stop_at:
        print(f"the score {options.stop_at:g} was not reached in {options.epochs} epochs: raise epochs or the sizes")
    print(f"model: {run.file(MODEL_FOLDER)}")


def unlearn_command(options: UnlearnOptions) -> None:
    """Unlearn rows of your own from a model, with an early stop at the forget threshold."""
    forget = load_examples(options.forget)
    retain = load_examples(options.retain) if options.retain else None
    test = load_examples(options.test) if options.test else retain
    method = _method(options.method, retain)
    if retain is not None:
        refuse_overlap(forget, retain, options.forget, options.retain)
    if options.test:
        refuse_overlap(forget, test, options.forget, options.test)
    threshold = options.threshold
    if threshold is None:
        threshold = scores.default_threshold(forget)
        print(f"threshold: {threshold:.4f}, the score of a model that has these rows mixed up or guesses")
    model, encoder = _load_to_unlearn(options)
    penalty = _penalty(options) if method == "ssiuu" else None
    for row in [*forget, *(retain or [])]:
        encoder.encode(row)
    run = RunFolder.create(options.output, "unlearn", asdict(options) | {"method": method, "threshold": threshold})
    before = _both_scores(model, encoder, forget, test)
    progress = unlearn(
        model,
        encoder,
        forget,
        retain if method != "ga" else None,
        objective="gd" if method == "ssiuu" else method,
        learning_rate=options.learning_rate,
        threshold=threshold,
        penalty=penalty,
        max_epochs=options.max_epochs,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        seed=options.seed,
        log=lambda row: run.log("steps.jsonl", row),
        description=method,
    )
    after = _both_scores(model, encoder, forget, test)
    models.save(model, encoder.tokenizer, run.file(MODEL_FOLDER))
    _carry_teaching(options.model, run)
    run.write_json("results.json", {"before": before, "after": after, "unlearning": progress.as_dict()})
    lines = [[name, *map(_number, row.values())] for name, row in (("before", before), (method, after))]
    print(table(["", "FS", "RS"], lines))
    print(
        "FS: forget rows. RS: "
        + ("held-out rows." if options.test else "retain rows, which the run trained on." if retain else "–")
    )
    print(f"{progress.steps} steps, {progress.epochs} epochs, stopped by {progress.stopped_by}")
    if penalty is not None:
        share = progress.penalty_share
        known = "" if share is None else f"; the penalty was {share:.1%} of the gradient on average"
        print(f"λ {_number(progress.weight)}{known}")
    for note in progress.notes:
        print(f"note: {note}")
    print(f"model: {run.file(MODEL_FOLDER)}")


def attack(options: AttackOptions) -> None:
    """Retrain an unlearned model a little and see how much of the forgotten comes back."""
    forget = load_examples(options.forget)
    instructions = None if options.instructions == "none" else load_instructions(options.instructions)
    model, encoder = _load(options)
    if adapters.is_adapted(model):
        print(f"{options.model} is an adapter: merged into its model in memory, all of which is attacked")
        model = adapters.merged(model)
    taught_at = _noted_teaching_rate(options.model) if options.taught_at is None else options.taught_at
    for row in [*forget, *(instructions or [])]:
        encoder.encode(row)
    run = RunFolder.create(options.output, "attack", asdict(options) | {"taught_at": taught_at})
    attacks: list[Attack] = []
    for seed in range(options.seeds):
        common = {"taught_at": taught_at, "seed": seed, "progress": True}
        attacks += [
            harmful_attack(model, encoder, forget, fraction, only_wrong=options.only_wrong, **common)
            for fraction in options.harmful
        ]
        if instructions is not None:
            attacks.append(benign_attack(model, encoder, forget, instructions, **common))
        run.write_json("results.json", [attack.as_dict() for attack in attacks])
    names = list(dict.fromkeys(attack.name for attack in attacks))
    rows = [
        [
            name,
            mean_sd([a.before for a in attacks if a.name == name]),
            mean_sd([a.recovered for a in attacks if a.name == name]),
        ]
        for name in names
    ]
    print(table(["attack", "before", "highest after"], rows))
    print(f"learning rates are multiples of {taught_at:g}, which taught the model; {options.seeds} seed(s)")
    print(f"written to {run.path}")


def evaluate(options: EvaluateOptions) -> None:
    """Score a model on a data set, on the whole of TOFU, or on tasks of lm-evaluation-harness."""
    scoring = prepare(options, lambda place: _load_from(place, options))
    model, encoder = _load(options)
    run = RunFolder.create(options.output, "evaluate", asdict(options))
    scored = scoring(model, encoder)
    run.write_json("results.json", scored.results)
    print(table(scored.header, scored.lines))
    print(f"written to {run.path}")


def influence(options: InfluenceOptions) -> None:
    """See whether an unlearning erased or hid, where, and by which neurons: a table and a page."""
    given = load_examples(options.data)
    rows = with_options(given, load_examples(options.distractors) if options.distractors else None)
    places = {"before": options.before, "after": options.after, "attacked": options.attacked}
    places = {role: place for role, place in places.items() if place is not None}
    max_length = _common_length(places, rows, options)
    run = RunFolder.create(options.output, "influence", asdict(options))
    disable_progress_bar()
    after = Path(options.after).resolve()
    found = study(
        # runs/unlearn-…/model goes by the name of its run
        after.parent.name if after.name == MODEL_FOLDER else after.name,
        places,
        rows,
        lambda place: _load_from(place, replace(options, max_length=max_length)),
        positions=options.positions,
        batch_size=options.batch_size,
        folder=run.path,
        notes=notes_on_options(given),
    )
    run.write_json("results.json", found.as_dict())
    page = write_page([found], run.path, "Erased or hidden?")
    text = study_text([found])
    run.file("table.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\npage: {page}\nattributions, pictures and their numbers: {run.path}/")


def compare(options: CompareOptions) -> None:
    """Find each method's learning rate, unlearn and attack over seeds, and print one table of all methods."""
    run = None
    if options.resume is not None:
        run, chosen = _stopped(options.resume, "compare")
        options = CompareOptions(**chosen)
    compared = setting(options)
    if run is None:
        run = RunFolder.create(options.output, "compare", asdict(options) | {"learning_rates": compared.sweep.rates})
    disable_progress_bar()
    start = compared.start
    if start is None:
        taught = memorised_in(run, compared.task, compared.recipe)
        print(f"taught a model of {taught['parameters'] / 1e6:.1f} M parameters: it scores {taught['score']:.3f}")
        start = run.file(TAUGHT)
    run_sweep(compared.sweep, compared.task, compared.recipe, start, run, notes=compared.notes)


def plan(options: PlanOptions) -> None:
    """Print the memory and the time that attribution, unlearning and the penalty will need, before anything runs."""
    print(Plan.of(options).text())


def _stopped(folder: str, command: str) -> tuple[RunFolder, dict]:
    """The folder of a stopped run and the options that it was started with."""
    run = RunFolder(Path(folder))
    config = run.read_json("config.json")
    if config["command"] != command:
        raise ValueError(f"{run.path} is the folder of `{config['command']}`, and only a {command} can be resumed here")
    print(f"going on in {run.path} with the options it was started with")
    return run, config["options"]


def _demo_setting(options: DemoOptions) -> tuple[Task, Recipe]:
    if options.data == "people":
        task, recipe = people_task(options.instructions or "exercises"), PEOPLE
    else:
        task, recipe = tofu_task(options.tofu, options.instructions or "tatsu-lab/alpaca"), TOFU
    if options.relative_weight is not None:
        recipe = replace(recipe, relative_weight=options.relative_weight)
    return task, recipe


def _method(asked: str | None, retain: list[Example] | None) -> str:
    if retain is None and asked in (None, "ga"):
        print("no retain rows were given, so there is nothing to hold the model together: unlearning by GA alone")
        return "ga"
    if retain is None:
        raise ValueError(f"method {asked} needs retain rows: give --retain FILE, or use --method ga")
    return asked or "ssiuu"


def _penalty(options: UnlearnOptions) -> dict:
    names = (
        "weight", "relative_weight", "target", "granularity", "reference", "one_sided", "every", "state_dtype",
    )  # fmt: skip
    return {name: getattr(options, name) for name in names}


def _load(options: AttackOptions | EvaluateOptions):
    return _load_from(options.model, options)


def _load_to_unlearn(options: UnlearnOptions):
    """The model with what is to be trained requiring grad: all of it, or the adapters that it has or gets."""
    if options.load_in_4bit and options.lora_rank is None and adapters.find_adapter(options.model) is None:
        raise ValueError("load_in_4bit: weights in 4 bits can't be trained, give lora_rank too")
    dtype = getattr(torch, options.dtype)
    device = models.default_device(options.device)
    model, tokenizer = models.load(options.model, dtype=dtype, device=device, load_in_4bit=options.load_in_4bit)
    encoder = _encoder(model, tokenizer, options.style, options.max_length)
    if options.lora_rank is not None:
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


def _load_from(place: str, options: AttackOptions | EvaluateOptions | InfluenceOptions):
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    model, tokenizer = models.load(place, dtype=dtype, device=models.default_device(options.device))
    return model, _encoder(model, tokenizer, options.style, options.max_length)


def _common_length(places: dict[str, str], rows: Sequence[Example], options: InfluenceOptions) -> int:
    """How many tokens of a row all of the models are to read: none more than any of them has positions for.

    Raises ValueError where a prompt is longer, or two of the models don't read the rows as the same tokens, before any
    model is loaded.
    """
    tokenizers = [models.load_tokenizer(place) for place in places.values()]
    positions = {
        place: _positions(read_config(models.base_name(place))) or options.max_length for place in places.values()
    }
    shortest = min(positions, key=positions.__getitem__)
    length = min(options.max_length, positions[shortest])
    encoders = [Encoder(tokenizer, style=options.style, max_length=length) for tokenizer in tokenizers]
    for row in rows:
        try:
            first, *others = (encoder.encode(row) for encoder in encoders)
        except ValueError as error:
            if length == options.max_length:
                raise
            raise ValueError(
                f"{shortest} has {length} positions, and a larger max_length won't help: {error}"
            ) from None
        if any(other != first for other in others):
            raise ValueError(
                f"the models don't read {row.prompt[:80]!r} as the same tokens: are they of one family, with one "
                "tokenizer and chat template? --style plain leaves templates out"
            )
    return length


def _encoder(model, tokenizer, style: str, max_length: int) -> Encoder:
    return Encoder(tokenizer, style=style, max_length=min(max_length, _positions(model.config) or max_length))


def _positions(config) -> int | None:
    return getattr(config, "max_position_embeddings", None)


def _both_scores(
    model, encoder: Encoder, forget: Sequence[Example], test: Sequence[Example] | None
) -> dict[str, float | None]:
    kept = None if test is None else scores.score(model, encoder, test, progress=True).mean
    return {"FS": scores.score(model, encoder, forget, progress=True).mean, "RS": kept}


def _noted_teaching_rate(model: str) -> float:
    noted = noted_teaching_rate(model)
    if noted is not None:
        return noted
    print(f"no {TEACHING_FILE} in {model}: attacking at multiples of {PUBLISHED_TEACHING_RATE:g}, or set --taught_at")
    return PUBLISHED_TEACHING_RATE


def _carry_teaching(model: str, run: RunFolder) -> None:
    """The unlearned model was taught at the rate that its origin was taught at."""
    noted = Path(model) / TEACHING_FILE
    if noted.exists():
        run.write_json(f"{MODEL_FOLDER}/{TEACHING_FILE}", json.loads(noted.read_text(encoding="utf-8")))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
