"""Erased or hidden, in words, with the thresholds that the words stand for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ssiuu_fast.ablation import AblationRow
from ssiuu_fast.influence import Amount, Cell
from ssiuu_fast.influence_study import AFTER, ATTACKED, BEFORE, LOG_PROBABILITY, PROBABILITY, Study
from ssiuu_fast.report.drawing import short

ERASED, HIDDEN, PARTLY_HIDDEN = "mostly erased", "mostly hidden", "hidden, at least in part"
UNCHANGED, UNKNOWN, NOT_UNLEARNED = "nothing changed", "can't tell", "not unlearned"
# accuracy: what counts as known, as forgotten, as brought back
STEP = 0.1
# of the accuracy that was lost: what an attack may bring back
REGAINED = 0.25
# of the support there was before: less than this is no change
SMALL = 0.01
TARGET_NAMES = {
    "probability": "P(answer)",
    "log_probability": "log P(answer)",
    "logit_difference": "logit difference",
}
RULES = (
    "“Mostly erased”: the 95 % interval of the sum of D+ (support lost) lies above 0 and above that of D− (suppression "
    "gained); “mostly hidden”: the other way round; otherwise “can't tell”. The sums run over all neurons, and those "
    "that moved the other way count against; for the interval the rows are drawn again 200 times.",
    f"“Nothing changed”: both intervals within {SMALL:.0%} of the support there was before.",
    "What a target would say whatever happened is set aside. Attributions of P(answer) fade with P: they look erased "
    "where P fell to less than a tenth. Those of log P(answer) fade as P nears 1: they look hidden where P was above a "
    "half. The targets that are left must say the same.",
    f"“{PARTLY_HIDDEN.capitalize()}”: silencing spurious neurons lifts accuracy above that of the unlearned model, and "
    f"above the best of all draws of random neurons, by {STEP:g} and by two standard errors, √(2/rows), or more, "
    "whatever the sums say.",
    "“Can't tell” instead of “mostly erased”: an attack regained more than a quarter of the lost accuracy.",
    f"“Not unlearned”: accuracy fell by less than {STEP:g}.",
)


@dataclass(frozen=True)
class Verdict:
    """word: one of the words above; reasons: sentences, the weightiest first."""

    word: str
    reasons: list[str]


@dataclass(frozen=True)
class Recovery:
    """What silencing m neurons brought accuracy to, at the best m: spurious ones, and the best of all random draws."""

    intact: float
    best: float
    m: int
    random: float
    rows: int

    @property
    def needed(self) -> float:
        """How much more accuracy counts: two standard errors of a difference, and a step at least."""
        return max(STEP, math.sqrt(2 / self.rows))

    @property
    def brings_back(self) -> bool:
        return self.best >= max(self.intact, self.random) + self.needed


def verdict(study: Study) -> Verdict:
    """The word for one unlearning."""
    had, has = study.accuracy[BEFORE], study.accuracy[AFTER]
    if had < study.chance + STEP:
        reason = (
            f"Before unlearning accuracy is {had:.2f}, and chance is {study.chance:.2f}: there was little to erase."
        )
        return Verdict(UNKNOWN, [reason])
    readings = {
        target: read_target(variation.total(), support(study, target)) for target, variation in study.variations.items()
    }
    words = set(readings.values())
    if had - has < STEP:
        word = UNCHANGED if words == {UNCHANGED} else NOT_UNLEARNED
        return Verdict(word, [f"Accuracy was {had:.2f} before and is {has:.2f} after: nothing was forgotten."])
    recovery = best_recovery(study.ablation, study.rows)
    reasons = [] if recovery is None else [_said(recovery)]
    reasons.append("By target: " + "; ".join(f"{TARGET_NAMES[t]}: {word}" for t, word in readings.items()) + ".")
    leaning = leanings(study.probability, readings)
    reasons += leaning.values()
    left = {word for target, word in readings.items() if target not in leaning}
    word = left.pop() if len(left) == 1 else UNKNOWN
    if ATTACKED in study.accuracy:
        regained = (study.accuracy[ATTACKED] - has) / (had - has)
        reasons.insert(0, _said_of_attack(study.accuracy[ATTACKED], has, regained))
        word = UNKNOWN if word == ERASED and regained > REGAINED else word
    if recovery is not None and recovery.brings_back and word != HIDDEN:
        word = PARTLY_HIDDEN
    return Verdict(word, reasons)


def read_target(total: Cell, support_before: float) -> str:
    """What the two sums of one target say."""
    lost, gained = total.positive, total.negative
    if lost.interval is None or gained.interval is None:
        return UNKNOWN
    if all(abs(end) <= SMALL * support_before for end in (*lost.interval, *gained.interval)):
        return UNCHANGED
    if _above(lost, gained):
        return ERASED
    return HIDDEN if _above(gained, lost) else UNKNOWN


def support(study: Study, target: str) -> float:
    """Σ over neurons of the mean largest attribution before unlearning."""
    return sum(float(means.sum()) for means in study.attributions[BEFORE][target].positive_max.values())


def best_recovery(ablation: Mapping[str, Sequence[AblationRow]], scored: int) -> Recovery | None:
    """None where nothing was silenced, because no neuron has a D-. scored: rows that accuracy was taken on."""
    rows = [row for rows in ablation.values() for row in rows]
    spurious = [row for row in rows if row.choice == "spurious" and row.silenced]
    if not spurious:
        return None
    best = max(spurious, key=lambda row: (row.score, -row.silenced))
    intact = next(row.score for row in rows if row.choice == "none")
    drawn = max((row.score for row in rows if row.choice == "random"), default=intact)
    return Recovery(intact, best.score, best.silenced, drawn, scored)


def leanings(probability: Mapping[str, float], readings: Mapping[str, str]) -> dict[str, str]:
    """Target → why it would have said what it says whatever happened."""
    had, has = probability[BEFORE], probability[AFTER]
    said = {}
    if readings.get(PROBABILITY) == ERASED and has < had / 10:
        said[PROBABILITY] = (
            f"Mean P(answer) fell from {short(had)} to {short(has)} and took its attributions along: this target would "
            "say “erased” whatever happened, and is set aside."
        )
    if readings.get(LOG_PROBABILITY) == HIDDEN and had > 0.5:
        said[LOG_PROBABILITY] = (
            f"Mean P(answer) was {short(had)} before, where log P is nearly flat and its attributions are small: this "
            "target would say “hidden” whatever happened, and is set aside."
        )
    return said


def half_of(curve) -> int:
    """How many neurons, largest first, hold half of a cumulative sum; 0 where it is 0."""
    whole = float(curve[-1]) if len(curve) else 0.0
    return int((curve < whole / 2).sum()) + 1 if whole > 0 else 0


def _above(one: Amount, other: Amount) -> bool:
    return one.interval[0] > max(0.0, other.interval[1])


def _said(recovery: Recovery) -> str:
    neurons = "neuron" if recovery.m == 1 else "neurons"
    text = (
        f"Silencing {recovery.m} spurious {neurons}, the best number of those tried, takes accuracy from "
        f"{recovery.intact:.2f} to {recovery.best:.2f}; silencing random ones, to {recovery.random:.2f} at best"
    )
    return text + ("." if recovery.brings_back else f": less than the {recovery.needed:.2f} more that would count.")


def _said_of_attack(accuracy: float, before: float, regained: float) -> str:
    return (
        f"The attack took accuracy from {before:.2f} to {accuracy:.2f}, {max(regained, 0):.0%} of what was lost (rows "
        "that it trained on included)."
    )
