"""Erased or hidden, in words, with the thresholds that the words stand for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ssiuu_fast.ablation import AblationRow
from ssiuu_fast.influence import Amount, Cell
from ssiuu_fast.influence_study import AFTER, BEFORE, Study
from ssiuu_fast.report.drawing import short

ERASED, HIDDEN, PARTLY_HIDDEN = "mostly erased", "mostly hidden", "hidden, at least in part"
UNCHANGED, UNKNOWN, NOT_UNLEARNED = "nothing changed", "can't tell", "not unlearned"
# accuracy: what counts as known, as forgotten, as brought back
STEP = 0.1
# of the support there was before: less than this is no change
SMALL = 0.01
TARGET_NAMES = {"probability": "P(answer)", "log_probability": "log P(answer)"}
RULES = (
    "“Mostly erased”: the 95 % interval of the sum of D+ (support lost) lies above 0 and above that of D− (suppression "
    "gained); “mostly hidden”: the other way round; otherwise “can't tell”. The intervals are of sums over all neurons, "
    "in which neurons that moved the other way count against; samples are drawn again 200 times.",
    f"“Nothing changed”: both intervals within {SMALL:.0%} of the support there was before.",
    "Both targets must say the same, because each leans its own way: attributions of P(answer) fade with P, after "
    "unlearning, and look erased; those of log P(answer) fade as P nears 1, before unlearning, and look hidden.",
    f"“{PARTLY_HIDDEN.capitalize()}”: silencing spurious neurons brings accuracy {STEP:g} above the unlearned model's "
    "and above the best of all draws of random neurons, whatever the sums say.",
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

    @property
    def brings_back(self) -> bool:
        return self.best >= self.intact + STEP and self.best >= self.random + STEP


def verdict(study: Study) -> Verdict:
    """The word for one unlearning."""
    had, has = study.accuracy[BEFORE], study.accuracy[AFTER]
    if had < study.chance + STEP:
        reason = f"Before unlearning accuracy is {had:.2f}, and chance is {study.chance:.2f}: there was little to erase."
        return Verdict(UNKNOWN, [reason])
    readings = {
        target: read_target(variation.total(), support(study, target)) for target, variation in study.variations.items()
    }
    words = set(readings.values())
    if had - has < STEP:
        word = UNCHANGED if words == {UNCHANGED} else NOT_UNLEARNED
        return Verdict(word, [f"Accuracy was {had:.2f} before and is {has:.2f} after: nothing was forgotten."])
    recovery = best_recovery(study.ablation)
    reasons = []
    if recovery is not None:
        reasons.append(_said(recovery))
    reasons.append("By target: " + "; ".join(f"{TARGET_NAMES[t]}: {word}" for t, word in readings.items()) + ".")
    reasons += leanings(study.probability, readings)
    if recovery is not None and recovery.brings_back and words != {HIDDEN}:
        return Verdict(PARTLY_HIDDEN, reasons)
    return Verdict(words.pop() if len(words) == 1 else UNKNOWN, reasons)


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


def best_recovery(ablation: Mapping[str, Sequence[AblationRow]]) -> Recovery | None:
    """None where nothing was silenced, because no neuron has a D-."""
    rows = [row for rows in ablation.values() for row in rows]
    spurious = [row for row in rows if row.choice == "spurious" and row.silenced]
    if not spurious:
        return None
    best = max(spurious, key=lambda row: (row.score, -row.silenced))
    intact = next(row.score for row in rows if row.choice == "none")
    drawn = max((row.score for row in rows if row.choice == "random"), default=intact)
    return Recovery(intact, best.score, best.silenced, drawn)


def leanings(probability: Mapping[str, float], readings: Mapping[str, str]) -> list[str]:
    """Where a target says what it would have said whatever happened."""
    had, has = probability[BEFORE], probability[AFTER]
    said = []
    if readings.get("probability") == ERASED and has < had / 10:
        said.append(
            f"The mean of P(answer) fell from {short(had)} to {short(has)}, and every attribution of it fell along: "
            "this target would say “erased” whatever happened."
        )
    if readings.get("log_probability") == HIDDEN and had > 0.5:
        said.append(
            f"The mean of P(answer) was {short(had)} before, where log P is nearly flat, so its attributions were small: "
            "this target would say “hidden” whatever happened."
        )
    return said


def half_of(curve) -> int:
    """How many neurons, largest first, hold half of a cumulative sum; 0 where it is 0."""
    whole = float(curve[-1]) if len(curve) else 0.0
    return int((curve < whole / 2).sum()) + 1 if whole > 0 else 0


def _above(one: Amount, other: Amount) -> bool:
    return one.interval[0] > max(0.0, other.interval[1])


def _said(recovery: Recovery) -> str:
    best = (
        f"accuracy from {recovery.intact:.2f} to {recovery.best:.2f} (the best of all m), random ones to "
        f"{recovery.random:.2f} at best"
    )
    neurons = "neuron" if recovery.m == 1 else "neurons"
    end = "" if recovery.brings_back else f": less than the {STEP:g} more that would count"
    return f"Silencing {recovery.m} spurious {neurons} brings {best}{end}."
