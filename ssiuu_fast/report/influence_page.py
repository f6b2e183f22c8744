"""The page and the table that say whether knowledge was erased or hidden."""

from collections.abc import Sequence
from pathlib import Path

from ssiuu_fast.correlation import Correlation
from ssiuu_fast.influence import TOP, Amount
from ssiuu_fast.influence_study import AFTER, LOG_PROBABILITY, LOGIT_DIFFERENCE, PROBABILITY, Study
from ssiuu_fast.report import html
from ssiuu_fast.report.drawing import MINUS, short
from ssiuu_fast.report.influence_pictures import UNITS, Picture, draw_all
from ssiuu_fast.report.text import table as text_table
from ssiuu_fast.report.verdict import RULES, TARGET_NAMES, best_recovery, half_of, reading, verdict
from ssiuu_fast.runs import environment

NAMED = 20
# what has no value, such as a share of nothing
UNDEFINED = "undefined"
_SAID_OF = {
    PROBABILITY: "The paper's target. Attributions fade as P nears 0, so what was unlearned well looks erased; and as "
    "P nears 1, so what was known for sure can look hidden.",
    LOG_PROBABILITY: "Attributions fade as P nears 1, so what was known well looks hidden.",
    LOGIT_DIFFERENCE: "The logit of the answer's first token minus that of a wrong answer's: it fades at neither end.",
}


def write_page(studies: Sequence[Study], folder: Path, title: str) -> Path:
    """Writes page.html, and under pictures/ each picture with its numbers; returns the page's path."""
    pictures_folder = folder / "pictures"
    pictures_folder.mkdir(exist_ok=True)
    pictures = draw_all(studies, pictures_folder)
    path = folder / "page.html"
    path.write_text(html.page(title, _parts(studies, pictures, title)), encoding="utf-8")
    return path


def verdict_table(studies: Sequence[Study]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a column for each unlearning. A row of a single cell is a heading."""
    rows = [
        ["verdict", *(verdict(study).word for study in studies)],
        ["accuracy (chance: " + ", ".join(sorted({f"{s.chance:.2f}" for s in studies})) + ")"]
        + [_change(study.accuracy, "{:.2f}") for study in studies],
        ["mean P(answer)", *(_change(study.probability) for study in studies)],
        ["silencing spurious neurons", *(_recovered(study) for study in studies)],
    ]
    targets = [t for t in (PROBABILITY, LOG_PROBABILITY, LOGIT_DIFFERENCE) if any(t in s.variations for s in studies)]
    for target in targets:
        rows.append([f"Attributions of {TARGET_NAMES[target]}"])
        rows += [[name, *cells] for name, cells in _target_rows(studies, target).items()]
    return ["", *(study.name for study in studies)], rows


def study_text(studies: Sequence[Study]) -> str:
    """The verdict table and the reasons, as plain text."""
    header, rows = verdict_table(studies)
    lines = [text_table(header, [row + [""] * (len(header) - len(row)) for row in rows]), ""]
    for study in studies:
        found = verdict(study)
        lines += [f"{study.name}: {found.word}", *(f"- {reason}" for reason in found.reasons)]
        lines += [f"note: {note}" for note in study.notes]
    return "\n".join(lines)


def _target_rows(studies: Sequence[Study], target: str) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    for number, study in enumerate(studies):
        cells = _target_cells(study, target) if target in study.variations else {}
        for name, cell in cells.items():
            rows.setdefault(name, ["–"] * len(studies))[number] = cell
    return rows


def _target_cells(study: Study, target: str) -> dict[str, str]:
    variation = study.variations[target]
    total, top, qk = variation.total(), variation.top(), variation.share_in_qk()
    minus = f"D{MINUS}"
    cells = {
        "reading": reading(study, target),
        "D+, support lost: sum": short(total.positive.sum),
        f"D+: sum of the top {TOP}": short(top.positive),
        "D+: unclamped sum, 95 % interval": _interval(total.positive),
        f"{minus}, suppression gained: sum": short(total.negative.sum),
        f"{minus}: sum of the top {TOP}": short(top.negative),
        f"{minus}: unclamped sum, 95 % interval": _interval(total.negative),
        "share of D+ in Q and K": _share(qk.positive),
        f"share of {minus} in Q and K": _share(qk.negative),
        f"neurons with half of all {minus}": f"{half_of(variation.curves().negative)} of {variation.neurons:,}",
    }
    for (one, other), found in study.correlations[target].items():
        cells[f"Pearson, Spearman ρ: {one}, {other}"] = _correlation(found)
    return cells


def _parts(studies: Sequence[Study], pictures: Sequence[Picture], title: str) -> list[str]:
    header, rows = verdict_table(studies)
    parts = [
        html.element("h1", title),
        html.element("p", f"{studies[0].rows} rows that were to be forgotten, before and after unlearning.", "quiet"),
        html.group("verdicts", (_card(study) for study in studies)),
        html.table("→ from before to after unlearning, and on to after the attack", header, rows, wraps=True),
        html.element("h2", "How the verdict is reached"),
        html.listing(RULES),
    ]
    for target in dict.fromkeys(picture.target for picture in pictures):
        heading = "Logit lens: what each layer knows" if target is None else f"Attributions of {TARGET_NAMES[target]}"
        parts.append(html.element("h2", heading))
        if target is not None:
            parts.append(html.element("p", _SAID_OF[target], "quiet"))
        shown = [picture for picture in pictures if picture.target == target]
        parts.append(html.group("pictures", (_figure(picture) for picture in shown)))
    parts.append(html.element("h2", "Spurious neurons by name"))
    for study in studies:
        parts += [_neurons(study, target) for target in study.variations]
    parts.append(html.element("h2", "Settings and notes"))
    for study in studies:
        parts += [html.element("h3", study.name), html.terms(_settings(study))]
        parts += [html.listing(study.notes)] if study.notes else []
    versions = environment()["versions"]
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    return [*parts, html.element("p", known, "quiet")]


def _card(study: Study) -> str:
    found = verdict(study)
    parts = [html.element("p", study.name, "quiet"), html.element("p", found.word.capitalize(), "word")]
    return html.group("verdict", parts + [html.element("p", reason) for reason in found.reasons])


def _figure(picture: Picture) -> str:
    return html.picture(picture.path, picture.study, picture.text, f"{picture.study}: {picture.title}. {picture.text}")


def _neurons(study: Study, target: str) -> str:
    spurious = study.variations[target].spurious(NAMED)
    caption = f"{study.name}, {TARGET_NAMES[target]}: largest D{MINUS}, and A where it suppresses most, {UNITS[target]}"
    if not spurious:
        return html.element("p", f"{caption}: no neuron gained suppression.")
    rows = [[f"{n.module}[{n.index}]", short(n.score), short(n.before), short(n.after)] for n in spurious]
    header = ["neuron", f"D{MINUS}", "A before", "A after"]
    return html.table(caption, header, rows)


def _settings(study: Study) -> list[tuple[str, str]]:
    settings = study.attributions[AFTER][PROBABILITY].settings
    return [
        *((role, place) for role, place in study.models.items()),
        ("rows", str(study.rows)),
        *(
            (f"data, {TARGET_NAMES[target]}", f"sha256 {by.settings['data']}")
            for target, by in study.attributions[AFTER].items()
            if target != LOG_PROBABILITY
        ),
        ("positions", settings["positions"]),
        ("dtype", settings["dtype"]),
        ("underflows", _underflows(study)),
        ("wrong answers", "an option of the row, else another row's answer; drawn with seed 0"),
    ]


def _underflows(study: Study) -> str:
    counts = {role: by[PROBABILITY].settings["underflows"] for role, by in study.attributions.items()}
    return "rows whose P(answer) is 0: " + ", ".join(f"{role} {count}" for role, count in counts.items())


def _change(values: dict[str, float], form: str | None = None) -> str:
    return " → ".join(short(value) if form is None else form.format(value) for value in values.values())


def _recovered(study: Study) -> str:
    found = best_recovery(study.ablation, study.chance, study.rows)
    if found is None:
        return f"no neuron has a D{MINUS}"
    controls = f"random: {found.random:.2f}, largest D+: {found.erased:.2f}"
    return f"{found.intact:.2f} → {found.best:.2f} with {found.m} ({controls})"


def _interval(amount: Amount) -> str:
    if amount.interval is None:
        return f"{short(amount.unclamped)} (no interval)"
    return f"{short(amount.unclamped)} [{short(amount.interval[0])}, {short(amount.interval[1])}]"


def _share(value: float) -> str:
    return UNDEFINED if value != value else f"{value:.0%}"


def _correlation(found: Correlation) -> str:
    # constant attributions, such as those of answers that all have P = 0, correlate with nothing
    return ", ".join(UNDEFINED if rho != rho else f"{rho:.2f}" for rho in (found.pearson, found.spearman))
