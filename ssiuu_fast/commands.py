"""The commands for one model, each a step of the story. `unlearn` has a file of its own."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from ssiuu_fast import adapters, models
from ssiuu_fast.compare_setting import PUBLISHED_TEACHING_RATE
from ssiuu_fast.data.collate import Encoder
from ssiuu_fast.data.example import Example
from ssiuu_fast.data.sources import load_examples, load_instructions
from ssiuu_fast.evaluation.attacks import Attack, benign_attack, harmful_attack
from ssiuu_fast.experiment import TEACHING_FILE, noted_teaching_rate, small_llama, teach
from ssiuu_fast.influence_study import notes_on_options, study, with_options
from ssiuu_fast.loading import encoder_of, load_from, positions_of
from ssiuu_fast.options import AttackOptions, EvaluateOptions, InfluenceOptions, MemorizeOptions
from ssiuu_fast.planning.plan import Plan
from ssiuu_fast.planning.plan_options import PlanOptions
from ssiuu_fast.planning.skeleton import read_config
from ssiuu_fast.report.influence_page import study_text, write_page
from ssiuu_fast.report.text import mean_sd, table
from ssiuu_fast.runs import MODEL_FOLDER, RunFolder
from ssiuu_fast.scoring import prepare


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
    encoder = encoder_of(model, tokenizer, "auto", options.max_length)
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


def attack(options: AttackOptions) -> None:
    """Retrain an unlearned model a little and see how much of the forgotten comes back."""
    forget = load_examples(options.forget)
    instructions = None if options.instructions == "none" else load_instructions(options.instructions)
    model, encoder = load_from(options.model, options)
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
    scoring = prepare(options, lambda place: load_from(place, options))
    model, encoder = load_from(options.model, options)
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
        lambda place: load_from(place, replace(options, max_length=max_length)),
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


def plan(options: PlanOptions) -> None:
    """Print the memory and the time that attribution, unlearning and the penalty will need, before anything runs."""
    print(Plan.of(options).text())


def _common_length(places: dict[str, str], rows: Sequence[Example], options: InfluenceOptions) -> int:
    """How many tokens of a row all of the models are to read: none more than any of them has positions for.

    Raises ValueError where a prompt is longer, or two of the models don't read the rows as the same tokens, before any
    model is loaded.
    """
    tokenizers = [models.load_tokenizer(place) for place in places.values()]
    positions = {
        place: positions_of(read_config(models.base_name(place))) or options.max_length for place in places.values()
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


def _noted_teaching_rate(model: str) -> float:
    noted = noted_teaching_rate(model)
    if noted is not None:
        return noted
    print(f"no {TEACHING_FILE} in {model}: attacking at multiples of {PUBLISHED_TEACHING_RATE:g}, or set --taught_at")
    return PUBLISHED_TEACHING_RATE
