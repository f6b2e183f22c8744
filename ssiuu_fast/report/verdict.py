"""Erased or hidden, in words, with the thresholds that the words stand for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ssiuu_fast.ablation import AblationRow
from ssiuu_fast.influence import Amount, Cell
from ssiuu_fast.influence_study import AFTER, ATTACKED, BEFORE, LOG_PROBABILITY, PROBABILITY, Study
from ssiuu_fast.report.drawing import short

ERASED, HIDDEN, PARTLY_HIDDEN = "mostly erased", "mostly hidden", "hidden, at least in part"
LITTLE_LOST = "of what was lost, most erased"
UNCHANGED, UNKNOWN, NOT_UNLEARNED = "nothing changed", "can't tell", "not unlearned"
# accuracy: what counts as known, as forgotten, as brought back
STEP = 0.1
# 0.9 - 0.8 is less than 0.1 in a computer
ROUNDING = 1e-9
# of the accuracy that was lost: what an attack may bring back
REGAINED = 0.25
# of the support there was before: less than this is no change
SMALL = 0.01
# of a target: with fewer samples, intervals of redrawn samples are much too narrow
FEWEST = 10
# of the mean of P(1 - P): attributions of P that grew along with it by this factor tell nothing
GREW = 2.0
TARGET_NAMES = {
    "probability": "P(answer)",
    "log_probability": "log P(answer)",
    "logit_difference": "logit difference",
}
RULES = (
    "“Mostly erased”: the 95 % interval of the sum of D+ (support lost) lies above 0 and above that of D− (suppression "
    "gained); “mostly hidden”: the other way round; otherwise “can't tell”. The sums run over all neurons, and those "
    "that moved the other way count against; for the interval the rows are drawn again 200 times. Fewer than "
    f"{FEWEST} rows say nothing, of a target or of all.",
    f"“Nothing changed”: both intervals within {SMALL:.0%} of the support there was before.",
    "What a target would say whatever happened is set aside. Attributions of P(answer) go with P(1 − P), which "
    "fades at both ends: they look erased where P fell to less than a tenth, and hidden where the mean of P(1 − P) "
    f"grew more than {GREW:g}-fold, as when P was near 1. Those of log P(answer) fade as P nears 1: they look hidden "
    "where the mean probability of a token of the answer was above a half. The targets that are left must say the "
    "same.",
    f"Silencing brings knowledge back where it lifts accuracy by {STEP:g} and by two standard errors, √(2/rows), or "
    "more above all of these: the unlearned model, chance, the best draw of as many random neurons, and as many "
    "neurons with the largest D+.",
    f"“{PARTLY_HIDDEN.capitalize()}”: silencing spurious neurons brings knowledge back, whatever the sums say.",
    "“Can't tell” instead of “mostly hidden”: silencing spurious neurons brings nothing back.",
    "“Can't tell” instead of “mostly erased”: an attack regained more than a quarter of the lost accuracy.",
    f"“{LITTLE_LOST.capitalize()}” instead of “mostly erased”: accuracy is still nearer to what it was than to chance.",
    f"“Not unlearned”: accuracy fell by less than {STEP:g}.",
)


@dataclass(frozen=True)
class Verdict:
    """word: one of the words above; reasons: sentences, the weightiest first."""

    word: str
    reasons: list[str]


@dataclass(frozen=True)
class Recovery:
    """What silencing m spurious neurons brought accuracy to, and its controls at the same m, where it did best.

    random: the best of the draws; erased: the m of the largest D+. Either is `intact` where it wasn't measured.
    """

    intact: float
    best: float
    m: int
    random: float
    erased: float
    chance: float
    rows: int

    @property
    def bar(self) -> float:
        """What anything else reaches. A model below chance comes up to it by whatever disturbs it."""
        return max(self.intact, self.random, self.erased, self.chance)

    @property
    def needed(self) -> float:
        """How much more accuracy counts: two standard errors of a difference, and a step at least."""
        return max(STEP, math.sqrt(2 / self.rows))

    @property
    def brings_back(self) -> bool:
        return self.best >= self.bar + self.needed - ROUNDING


def verdict(study: Study) -> Verdict:
    """The word for one unlearning."""
    had, has = study.accuracy[BEFORE], study.accuracy[AFTER]
    if study.rows < FEWEST:
        # accuracies as well as intervals: what is brought back, too, could be luck
        return Verdict(UNKNOWN, [f"Measured on {_counted(study.rows, 'row')}: fewer than {FEWEST} say nothing."])
    if had < study.chance + STEP:
        reason = (
            f"Before unlearning accuracy is {had:.2f}, and chance is {study.chance:.2f}: there was little to erase."
        )
        return Verdict(UNKNOWN, [reason])
    readings = {target: reading(study, target) for target in study.variations}
    words = set(readings.values())
    if had - has < STEP - ROUNDING:
        word = UNCHANGED if words == {UNCHANGED} else NOT_UNLEARNED
        return Verdict(
            word, [f"Accuracy was {had:.2f} before and is {has:.2f} after: less than {STEP:.2f} was forgotten."]
        )
    recovery = best_recovery(study.ablation, study.chance, study.rows)
    reasons = [] if recovery is None else [_said(recovery)]
    reasons.append("By target: " + "; ".join(f"{TARGET_NAMES[t]}: {word}" for t, word in readings.items()) + ".")
    reasons += [
        f"{TARGET_NAMES[target]} has {_counted(variation.samples, 'row')}: fewer than {FEWEST} say nothing."
        for target, variation in study.variations.items()
        if variation.samples < FEWEST
    ]
    leaning = leanings(study, readings)
    reasons += leaning.values()
    left = {word for target, word in readings.items() if target not in leaning}
    word = left.pop() if len(left) == 1 else UNKNOWN
    if ATTACKED in study.accuracy:
        regained = (study.accuracy[ATTACKED] - has) / (had - has)
        reasons.insert(0, _said_of_attack(study.accuracy[ATTACKED], has, regained))
        word = UNKNOWN if word == ERASED and regained > REGAINED else word
    if word == ERASED and had - has < has - study.chance:
        reasons.insert(0, f"Accuracy {has:.2f} is still nearer to {had:.2f} than to chance, {study.chance:.2f}.")
        word = LITTLE_LOST
    if recovery is not None and recovery.brings_back:
        word = HIDDEN if word == HIDDEN else PARTLY_HIDDEN
    elif recovery is not None and word == HIDDEN:
        reasons.insert(0, "The sums say hidden, but silencing brings nothing back.")
        word = UNKNOWN
    return Verdict(word, reasons)


def reading(study: Study, target: str) -> str:
    """What one target says."""
    variation = study.variations[target]
    return read_target(variation.total(), support(study, target), variation.samples)


def read_target(total: Cell, support_before: float, samples: int) -> str:
    """What the two sums of one target say."""
    lost, gained = total.positive, total.negative
    if samples < FEWEST or lost.interval is None or gained.interval is None:
        return UNKNOWN
    if all(abs(end) <= SMALL * support_before for end in (*lost.interval, *gained.interval)):
        return UNCHANGED
    if _above(lost, gained):
        return ERASED
    return HIDDEN if _above(gained, lost) else UNKNOWN


def support(study: Study, target: str) -> float:
    """Σ over neurons of the mean largest attribution before unlearning."""
    return sum(float(means.sum()) for means in study.attributions[BEFORE][target].positive_max.values())


def best_recovery(ablation: Mapping[str, Sequence[AblationRow]], chance: float, scored: int) -> Recovery | None:
    """Where silencing spurious neurons outdid its controls most; of equals, the one with fewest neurons.

    None where nothing was silenced, because no neuron has a D-. scored: rows that accuracy was taken on.
    """
    # random neurons are the same ones whatever the target, and were measured with one target alone
    drawn = [row for rows in ablation.values() for row in rows if row.choice == "random"]
    found = []
    for rows in ablation.values():
        tried = set()
        for row in rows:
            # asked for more than have a D-, the same ones are silenced again
            if row.choice != "spurious" or not row.silenced or row.silenced in tried:
                continue
            tried.add(row.silenced)
            intact = next(other.score for other in rows if other.choice == "none")
            random = max((other.score for other in drawn if other.m == row.m), default=intact)
            erased = max(
                (other.score for other in rows if other.choice == "erased" and other.m == row.m), default=intact
            )
            found.append(Recovery(intact, row.score, row.silenced, random, erased, chance, scored))
    return max(found, key=lambda recovery: (recovery.best - recovery.bar, -recovery.m), default=None)


def leanings(study: Study, readings: Mapping[str, str]) -> dict[str, str]:
    """Target → why it would have said what it says whatever happened."""
    had, has = study.probability[BEFORE], study.probability[AFTER]
    said = {}
    if readings.get(PROBABILITY) == ERASED and has < had / 10:
        said[PROBABILITY] = (
            f"Mean P(answer) fell from {short(had)} to {short(has)} and took its attributions along: this target would "
            "say “erased” whatever happened, and is set aside."
        )
    unsure_before, unsure_after = study.unsureness[BEFORE], study.unsureness[AFTER]
    if readings.get(PROBABILITY) == HIDDEN and unsure_after > GREW * unsure_before:
        said[PROBABILITY] = (
            f"The mean of P(1 − P), which attributions of P(answer) go with, grew from {short(unsure_before)} "
            f"to {short(unsure_after)}, and suppression with it: this target would say “hidden” whatever happened, and "
            "is set aside."
        )
    token = study.token_probability[BEFORE]
    if readings.get(LOG_PROBABILITY) == HIDDEN and token > 0.5:
        said[LOG_PROBABILITY] = (
            f"The mean probability of a token of the answer was {short(token)} before, where log P is nearly flat and "
            "its attributions are small: this target would say “hidden” whatever happened, and is set aside."
        )
    return said


def half_of(curve) -> int:
    """How many neurons, largest first, hold half of a cumulative sum; 0 where it is 0."""
    whole = float(curve[-1]) if len(curve) else 0.0
    return int((curve < whole / 2).sum()) + 1 if whole > 0 else 0


def _above(one: Amount, other: Amount) -> bool:
    return one.interval[0] > max(0.0, other.interval[1])


def _said(recovery: Recovery) -> str:
    text = (
        f"Silencing {_counted(recovery.m, 'spurious neuron')}, the best number of those tried, takes accuracy from "
        f"{recovery.intact:.2f} to {recovery.best:.2f}; silencing random ones, to {recovery.random:.2f} at best; those "
        f"with the largest D+, to {recovery.erased:.2f}; chance is {recovery.chance:.2f}"
    )
    return text + ("." if recovery.brings_back else f": less than the {recovery.needed:.2f} more that would count.")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _said_of_attack(accuracy: float, before: float, regained: float) -> str:
    return (
        f"The attack took accuracy from {before:.2f} to {accuracy:.2f}, {max(regained, 0):.0%} of what was lost (rows "
        "that it trained on included)."
    )
