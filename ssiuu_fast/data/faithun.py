"""FaithUn: questions on real people, with other questions that hang on the same facts (arXiv 2502.19207).

A base question is a cluster; around it are paraphrases, multi-hop questions and questions with the same answer.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssiuu_fast.data.example import Example, require_rows
from ssiuu_fast.data.jsonl import false_options, text
from ssiuu_fast.warn import warn_user

# the names of a cluster's sets here and in the file
QUESTIONS = {
    "base": "hop1_unlearn",
    "paraphrase": "hop1_test",
    "multi_hop": "hop2_test",
    "same_answer": "same_object",
}
SPLIT_FILES = {"forget": "forget_set_split.txt", "retain": "retaining_set_split.txt", "test": "test_set_split.txt"}
# the benchmark asks with three options
FALSE_OPTIONS = 2
_EXPECTED = (
    'a JSON object with one entry an entity, each with the lists "hop1_unlearn", "hop1_test", "hop2_test" and '
    '"same_object" of {"question", "answers", "false_answer_options"}'
)


@dataclass(frozen=True)
class Cluster:
    """A base question and what is asked beside it. `subject` of each row is the entity's id."""

    base: Example
    paraphrase: tuple[Example, ...]
    multi_hop: tuple[Example, ...]
    same_answer: tuple[Example, ...]


def load_clusters(source) -> list[Cluster]:
    """Every cluster in the file's order, which is what the split files count in.

    source: the JSON file, a folder that holds it, or a hub name (owner/name). The answer is the first of "answers",
    the false options are the first two of "false_answer_options" that aren't answers. Which cluster a further question
    belongs to: item i of a list of lists is cluster i's; in a plain list a paraphrase or a same-answer question
    belongs to the entity's clusters that share an answer with it, and a multi-hop question, or one that shares none,
    to all of the entity's.
    Raises FileNotFoundError, or ValueError with entity, list, number and what is expected.
    """
    file = _file(_local(source))
    clusters = []
    for entity, entry in _entities(file):
        where = f"{file}, entity {entity}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: {_short(entry)} is not an object; expected {_EXPECTED}")
        clusters += _clusters(where, entity, entry)
    if not clusters:
        raise ValueError(f"{file} is empty: it has no base questions; expected {_EXPECTED}")
    return clusters


def load_split(source, split: str, questions: str = "base") -> list[Example]:
    """The questions of one kind that belong to the clusters of one split, each once.

    A question beside the base (a multi-hop one above all) may belong to clusters of several splits: it is of the first
    of forget, retain, test alone, and a UserWarning says how many another split loses thereby. So what is trained on
    isn't in the test, and what is to be kept isn't in what is to be forgotten.

    source: a folder (or hub name) with the JSON file and the split files, in itself or its folder `splits`. split:
    forget, retain or test. questions: base, paraphrase, multi_hop or same_answer; all rows are multiple choice.
    Raises FileNotFoundError or ValueError for files that are missing or not FaithUn's (for questions beside the base
    also those of the splits before), and ValueError where no row is left.
    """
    if split not in SPLIT_FILES:
        raise ValueError(f"unknown FaithUn split {split!r}; known: {', '.join(SPLIT_FILES)}")
    if questions not in QUESTIONS:
        raise ValueError(f"unknown FaithUn questions {questions!r}; known: {', '.join(QUESTIONS)}")
    folder = _local(source)
    clusters = load_clusters(folder)

    def chosen(split: str) -> list[Cluster]:
        return [clusters[index] for index in read_split(_split_file(folder, split), len(clusters))]

    if questions == "base":
        return [cluster.base for cluster in chosen(split)]
    before = list(SPLIT_FILES)[: list(SPLIT_FILES).index(split)]
    theirs = {row for other in before for cluster in chosen(other) for row in getattr(cluster, questions)}
    found = list(dict.fromkeys(row for cluster in chosen(split) for row in getattr(cluster, questions)))
    rows = [row for row in found if row not in theirs]
    if len(rows) < len(found):
        warn_user(
            f"{len(found) - len(rows)} of the {len(found)} {questions} questions of FaithUn's {split} split are left "
            f"out: they also belong to clusters of {' or '.join(before)}"
        )
    require_rows(rows, f"{questions} questions of FaithUn's {split} split in {source}")
    return rows


def read_split(path, clusters: int) -> list[int]:
    """The cluster indices of a split file, one a line. Raises ValueError for one that isn't in range(clusters)."""
    path = Path(path)
    indices = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        index = int(line) if line.strip().isdecimal() else -1
        if not 0 <= index < clusters:
            raise ValueError(
                f"{path}, line {number}: {line.strip()!r} is not the index of one of the {clusters} clusters; do the "
                "split file and the data file belong together?"
            )
        indices.append(index)
    require_rows(indices, f"split file {path}")
    return indices


def _clusters(where: str, entity: str, entry: dict) -> list[Cluster]:
    asked = {name: _list(where, entry, key) for name, key in QUESTIONS.items()}
    base = [_question(f"{where}, {QUESTIONS['base']} {i}", entity, row) for i, row in enumerate(asked.pop("base"))]
    beside = {name: _beside(f"{where}, {QUESTIONS[name]}", entity, name, rows, base) for name, rows in asked.items()}
    return [
        Cluster(example, **{name: tuple(of_cluster[i]) for name, of_cluster in beside.items()})
        for i, (example, _) in enumerate(base)
    ]


def _beside(where: str, entity: str, name: str, rows: list, base: Sequence[tuple]) -> list[list[Example]]:
    """The rows of one list, cluster by cluster."""
    if rows and all(isinstance(row, list) for row in rows):
        if len(rows) != len(base):
            raise ValueError(f"{where}: {len(rows)} lists for {len(base)} base questions; expected one for each")
        return [
            [_question(f"{where} {i}.{j}", entity, row)[0] for j, row in enumerate(group)]
            for i, group in enumerate(rows)
        ]
    clusters: list[list[Example]] = [[] for _ in base]
    for j, row in enumerate(rows):
        example, answers = _question(f"{where} {j}", entity, row)
        # the answer of a multi-hop question isn't its cluster's
        owners = [i for i, (_, own) in enumerate(base) if name == "multi_hop" or own & answers]
        for i in owners or range(len(base)):
            clusters[i].append(example)
    return clusters


def _question(where: str, entity: str, row) -> tuple[Example, frozenset[str]]:
    """A question, and everything that answers it."""
    try:
        if not isinstance(row, dict):
            raise ValueError(f"{_short(row)} is not an object")
        question = text(row, "question")
        answers = _texts(row, "answers")
        right = frozenset(answer.casefold() for answer in answers)
        wrong = [
            option
            for option in false_options(_texts(row, "false_answer_options"), answers[0])
            if option.casefold() not in right
        ]
        if not wrong:
            raise ValueError('field "false_answer_options" holds no wrong answer')
    except ValueError as error:
        raise ValueError(f"{where}: {error}; expected {_EXPECTED}") from None
    return Example(question, answers[0], tuple(wrong[:FALSE_OPTIONS]), subject=entity), right


def _texts(row: dict, name: str) -> list[str]:
    values = row.get(name)
    if isinstance(values, str):
        values = [values]
    if not isinstance(values, list) or not values:
        found = ", ".join(row) or "no fields"
        raise ValueError(f'field "{name}" is missing or no list of texts (found: {found})')
    return [text({name: value}, name) for value in values]


def _list(where: str, entry: dict, key: str) -> list:
    rows = entry.get(key)
    if not isinstance(rows, list):
        raise ValueError(f'{where}: list "{key}" is missing (found: {", ".join(entry)}); expected {_EXPECTED}')
    return rows


def _entities(file: Path) -> Iterable[tuple[str, dict]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}: not JSON ({error.msg}); expected {_EXPECTED}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: {_short(content)} is not an object; expected {_EXPECTED}")
    return content.items()


def _local(source) -> Path:
    """The folder or file itself, or the files of a hub data set."""
    path = Path(source)
    if path.exists():
        return path
    if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1 or path.suffix:
        raise FileNotFoundError(f"{source}: no such file or folder, and not a hub name (owner/name) either")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source), repo_type="dataset", allow_patterns=["*.json", "*.txt"]))


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted({*path.glob("*.json"), *path.glob("*/*.json")})
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise FileNotFoundError(f"{path}: one *.json file was expected, FaithUn's own (found: {names}); name the file")
    return found[0]


def _split_file(path: Path, split: str) -> Path:
    folder = path.parent if path.is_file() else path
    name = SPLIT_FILES[split]
    found = sorted({*folder.glob(name), *folder.glob(f"*/{name}"), *folder.glob(f"*/*/{name}")})
    if not found:
        raise FileNotFoundError(f"{folder} and its folders hold no {name}, the cluster indices of the {split} split")
    return found[0]


def _short(value) -> str:
    return f"{json.dumps(value, ensure_ascii=False)[:60]}"
