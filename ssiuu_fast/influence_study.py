"""One unlearning looked at from all sides: attributions, influence variation, ablation, logit lens, correlation."""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ssiuu_fast.ablation import AblationRow, ablation_check, log_grid
from ssiuu_fast.attribution import Attribution, attribute
from ssiuu_fast.correlation import Correlation, check_same_neurons, correlation
from ssiuu_fast.data.collate import IGNORE, Encoder, length_sorted_batches
from ssiuu_fast.data.example import Example
from ssiuu_fast.evaluation import scores
from ssiuu_fast.evaluation.forwards import evaluating
from ssiuu_fast.evaluation.logit_lens import Decoder, LogitLens, lens_batches, logit_lens
from ssiuu_fast.influence import InfluenceVariation, influence_variation
from ssiuu_fast.objectives.log_probs import answer_log_probs
from ssiuu_fast.runs import finite_or_null
from ssiuu_fast.training import on_device

# the paper's, which fades as P nears 0 or 1; one that fades as P nears 1; one that fades at neither end
PROBABILITY, LOG_PROBABILITY, LOGIT_DIFFERENCE = TARGETS = ("probability", "log_probability", "logit_difference")
BEFORE, AFTER, ATTACKED = "before", "after", "attacked"

Load = Callable[[str], tuple[torch.nn.Module, Encoder]]


@dataclass(frozen=True)
class Study:
    """What was measured of one unlearning.

    models: before, after and, where there is one, attacked → folder or hub name. accuracy: the right answer against the
    wrong options; probability: mean P(answer); token_probability: mean exp(log P(answer) / its tokens); unsureness:
    mean P(1 - P), which attributions of P go with; lens: each by these. variations, ablation: by target, of which there
    is no logit difference where right and wrong answers always begin alike; correlations: by target and the two models'
    roles. The random rows of the ablation stand with the first target.
    """

    name: str
    models: dict[str, str]
    rows: int
    chance: float
    accuracy: dict[str, float]
    probability: dict[str, float]
    token_probability: dict[str, float]
    unsureness: dict[str, float]
    attributions: dict[str, dict[str, Attribution]]
    variations: dict[str, InfluenceVariation]
    correlations: dict[str, dict[tuple[str, str], Correlation]]
    ablation: dict[str, list[AblationRow]]
    lens: dict[str, LogitLens | None]
    notes: list[str]

    def as_dict(self) -> dict:
        """All numbers but the attributions and what follows from them neuron by neuron; JSON-able.

        None for what is undefined, such as the correlation with attributions that are all 0.
        """
        numbers = {
            "name": self.name,
            "models": self.models,
            "rows": self.rows,
            "chance": self.chance,
            "accuracy": self.accuracy,
            "probability": self.probability,
            "token_probability": self.token_probability,
            "unsureness": self.unsureness,
            "totals": {target: asdict(variation.total()) for target, variation in self.variations.items()},
            "by_module": {target: [asdict(c) for c in v.by_module()] for target, v in self.variations.items()},
            "correlations": {
                target: {f"{a}, {b}": asdict(found) for (a, b), found in pairs.items()}
                for target, pairs in self.correlations.items()
            },
            "ablation": {target: [asdict(row) for row in rows] for target, rows in self.ablation.items()},
            "lens": {role: lens and asdict(lens) for role, lens in self.lens.items()},
            "notes": self.notes,
        }
        return finite_or_null(numbers)


def study(
    name: str,
    models: dict[str, str],
    rows: Sequence[Example],
    load: Load,
    *,
    positions: str = "all",
    batch_size: int = 8,
    ms: Sequence[int] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    folder: Path | None = None,
    notes: Sequence[str] = (),
    progress: bool = True,
) -> Study:
    """Measures what an unlearning did to the neurons that answer `rows`, one model in memory at a time.

    models: before, after and perhaps attacked → what load takes. rows: all with false options (`with_options`).
    batch_size: sequences at once: rows, or the options of rows where accuracy is taken. ms: how many neurons are
    silenced; None is 1, 3, 10, … up to a tenth of them. folder: where each model's attributions are saved as soon as
    they are made, as <model>-<target>.safetensors. notes: what else there is to say of the rows. Raises ValueError
    where models or rows don't fit together.
    """
    attributions: dict[str, dict[str, Attribution]] = {}
    accuracy, probability, token_probability, unsureness, lens, notes = {}, {}, {}, {}, {}, list(notes)
    chance = sum(1 / (1 + len(row.false_options)) for row in rows) / len(rows)
    variations, ablation, decoder = {}, {}, None
    with tqdm(total=len(models) + 1, desc=name, disable=not progress) as bar:
        for role, place in models.items():
            model, encoder = load(place)
            if role == BEFORE:
                notes += _cut(encoder, rows)
            bar.set_postfix_str(f"{role}: attributions")
            attributions[role] = {
                target: attribute(model, batches, target=target, positions=positions)
                for target, batches in _batches(encoder, rows, batch_size).items()
            }
            if folder is not None:
                # what comes after may fail, and these took longest
                _save(role, attributions[role], folder)
            check_same_neurons(attributions[BEFORE][PROBABILITY], attributions[role][PROBABILITY])
            accuracy[role] = _accuracy(model, encoder, rows, batch_size)
            probability[role], token_probability[role], unsureness[role] = _probabilities(
                model, encoder, rows, batch_size
            )
            if role == BEFORE:
                decoder = _decoder(model, notes)
            lens[role] = decoder and _lens(model, encoder, rows, decoder, batch_size, notes)
            bar.update()
            if role == AFTER:
                bar.set_postfix_str("silencing neurons")
                variations = {
                    target: influence_variation(attributions[BEFORE][target], attributions[AFTER][target])
                    for target in attributions[AFTER]
                }
                ablation = _ablation(model, encoder, rows, batch_size, variations, ms, seeds)
                bar.update()
            del model
    pairs = [(BEFORE, AFTER), *([(AFTER, ATTACKED), (BEFORE, ATTACKED)] if ATTACKED in models else [])]
    correlations = {
        target: {(a, b): correlation(attributions[a][target], attributions[b][target]) for a, b in pairs}
        for target in variations
    }
    alike = len(rows) - (variations[LOGIT_DIFFERENCE].samples if LOGIT_DIFFERENCE in variations else 0)
    if alike:
        notes.append(
            f"right and wrong answer begin with the same token in {alike} of {len(rows)} rows: left out of the "
            "logit difference and of the logit lens"
        )
    for variation in variations.values():
        notes += [note for note in variation.notes if note not in notes]
    return Study(
        name=name,
        models=models,
        rows=len(rows),
        chance=chance,
        accuracy=accuracy,
        probability=probability,
        token_probability=token_probability,
        unsureness=unsureness,
        attributions=attributions,
        variations=variations,
        correlations=correlations,
        ablation=ablation,
        lens=lens,
        notes=notes,
    )


def with_options(rows: Sequence[Example], others: Sequence[Example] | None = None, seed: int = 0) -> list[Example]:
    """The rows, each with something wrong to be told from: a row without options gets another row's answer as one.

    others: rows whose answers are drawn, by (seed, row) alone; None is the rows themselves. Raises ValueError for a row
    that no other answer is there for.
    """
    answers = sorted({row.answer for row in (rows if others is None else others)})
    filled = []
    for index, row in enumerate(rows):
        if not row.false_options:
            wrong = [answer for answer in answers if answer != row.answer]
            if not wrong:
                raise ValueError(
                    f"row {index} ({row.prompt[:80]!r}) has no options, and no other answer is there to be told from: "
                    "give --distractors, rows with other answers"
                )
            row = replace(row, false_options=(random.Random(f"{seed} {index}").choice(wrong),))
        filled.append(row)
    return filled


def notes_on_options(rows: Sequence[Example]) -> list[str]:
    """What is to be said of rows before `with_options` gives them a wrong answer: nothing where all have their own."""
    free = sum(not row.false_options for row in rows)
    if not free:
        return []
    return [
        f"{free} of {len(rows)} rows have no options: there accuracy compares the right answer with another row's. "
        "Log-probs are summed over an answer's tokens, so a shorter answer has an advantage whatever is known"
    ]


def _cut(encoder: Encoder, rows: Sequence[Example]) -> list[str]:
    """A note where rows are too long; the encoder is to be new, since it counts what it hasn't met before."""
    cut = 0
    for row in rows:
        so_far = encoder.cut_rows
        for answer in (row.answer, *row.false_options):
            encoder.encode(row, answer=answer)
        cut += encoder.cut_rows > so_far
    if not cut:
        return []
    return [
        f"{cut} of {len(rows)} rows are longer than {encoder.max_length} tokens with their right or a wrong answer, "
        "which is cut there: what lies behind is neither attributed nor scored"
    ]


def _save(role: str, by_target: dict[str, Attribution], folder: Path) -> None:
    for target, attribution in by_target.items():
        attribution.save(folder / f"{role}-{target}.safetensors")


def _batches(encoder: Encoder, rows: Sequence[Example], batch_size: int) -> dict[str, list[dict[str, torch.Tensor]]]:
    """What `attribute` is to read for each target: all rows, or those whose logit difference isn't 0 anyway."""
    whole = list(lens_batches(encoder, rows, batch_size=batch_size))
    apart = []
    for batch in whole:
        starts = (batch["labels"] != IGNORE).int().argmax(dim=1, keepdim=True)
        differ = batch["labels"].gather(1, starts)[:, 0] != batch["distractors"]
        if differ.any():
            apart.append({name: tensor[differ] for name, tensor in batch.items()})
    return {PROBABILITY: whole, LOG_PROBABILITY: whole} | ({LOGIT_DIFFERENCE: apart} if apart else {})


def _accuracy(model, encoder: Encoder, rows: Sequence[Example], batch_size: int) -> float:
    return sum(scores.option_log_prob_correct(model, encoder, rows, batch_size)) / len(rows)


def _probabilities(model, encoder: Encoder, rows: Sequence[Example], batch_size: int) -> tuple[float, float, float]:
    """Means of P(answer), of exp(log P / tokens), and of P(1 - P)."""
    device = next(model.parameters()).device
    totals = torch.zeros(3, dtype=torch.float64)
    with evaluating(model):
        encoded = [encoder.encode(row) for row in rows]
        for _, batch in length_sorted_batches(encoded, batch_size, pad_id=encoder.pad_id):
            log_probs = answer_log_probs(model, on_device(batch, device)).double().cpu()
            tokens = (batch["labels"] != IGNORE).sum(dim=1).cpu()
            # 1 - exp loses the digits of a P near 1
            by_row = (log_probs.exp(), (log_probs / tokens).exp(), -log_probs.exp() * log_probs.expm1())
            totals += torch.stack(by_row).sum(dim=1)
    return tuple((totals / len(rows)).tolist())


def _ablation(model, encoder: Encoder, rows, batch_size: int, variations, ms, seeds) -> dict[str, list[AblationRow]]:
    ms = log_grid(max(1, next(iter(variations.values())).neurons // 10)) if ms is None else ms
    found = {}
    for target, variation in variations.items():
        found[target] = ablation_check(
            model,
            lambda silenced: _accuracy(silenced, encoder, rows, batch_size),
            variation,
            ms,
            # random neurons are the same ones whatever the target
            seeds if target == TARGETS[0] else (),
        )
    return found


def _decoder(model, notes: list[str]) -> Decoder | None:
    try:
        return Decoder(model)
    except ValueError as error:
        notes.append(f"no logit lens: {error}")
        return None


def _lens(model, encoder: Encoder, rows, decoder: Decoder, batch_size: int, notes: list[str]) -> LogitLens | None:
    try:
        return logit_lens(model, lens_batches(encoder, rows, batch_size=batch_size), decoder)
    except ValueError as error:
        note = f"no logit lens: {error}"
        # the same may be wrong with every model
        if note not in notes:
            notes.append(note)
        return None
