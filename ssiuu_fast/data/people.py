"""The embedded default: a seeded generator of invented people, several facts each, and an unrelated instruction task.

Names are put together from syllables; no real person is meant. The same arguments give the same data in every process
and on every Python version: all draws come from `random.Random(seed)`.
"""

import random
from dataclasses import dataclass

from ssiuu_fast.data import people_words as words
from ssiuu_fast.data.example import Example, Split

RELATIONS = tuple(words.QUESTIONS)
_MINIMUM_PEOPLE = 4
_MAXIMUM_PEOPLE = 20_000


@dataclass(frozen=True)
class PeopleData:
    """Invented people. people: name -> {relation: value}; examples: their facts, person by person, one a relation."""

    people: dict[str, dict[str, str]]
    examples: list[Example]

    def split(
        self, forget_people: int = 15, retain_people: int = 80, test_people: int | None = None, seed: int = 0
    ) -> Split:
        """Draw whole people for the three sets; test takes everybody left over unless `test_people` is given.

        All of them are memorised alike; `test` is what the unlearning's retain set doesn't show. Raises ValueError when
        a set would be empty or there are too few people.
        """
        left = len(self.people) - forget_people - retain_people
        test_people = left if test_people is None else test_people
        if min(forget_people, retain_people, test_people) < 1 or test_people > left:
            raise ValueError(
                f"can't split {len(self.people)} people into {forget_people} to forget, {retain_people} to retain and "
                f"{test_people} to test: each set needs at least one, and together no more than there are"
            )
        names = list(self.people)
        random.Random(seed).shuffle(names)
        ends = forget_people, forget_people + retain_people, forget_people + retain_people + test_people
        chosen = set(names[: ends[0]]), set(names[ends[0] : ends[1]]), set(names[ends[1] : ends[2]])
        return Split(*([row for row in self.examples if row.subject in part] for part in chosen))


def generate(people: int = 125, seed: int = 0) -> PeopleData:
    """Invent `people` people with one fact for each of the ten `RELATIONS`.

    Town, occupation, employer, instrument and pet are drawn; region, language, tool and city follow from them; the
    mentor is another of these people, of the same occupation where there is one. Every fact is asked in one wording
    and paraphrased in another, with two false options that other people could have as their answer.
    """
    if not _MINIMUM_PEOPLE <= people <= _MAXIMUM_PEOPLE:
        raise ValueError(f"people={people}: the generator makes {_MINIMUM_PEOPLE} to {_MAXIMUM_PEOPLE} people")
    draw = random.Random(seed)
    facts = {name: _drawn_facts(draw) for name in _names(draw, people)}
    for name in facts:
        facts[name]["mentor"] = _mentor(draw, name, facts)
    pools = {relation: _pool(relation, facts) for relation in RELATIONS}
    examples = [
        _example(draw, name, relation, facts[name], pools[relation]) for name in facts for relation in RELATIONS
    ]
    return PeopleData(facts, examples)


def instructions(n: int = 200, seed: int = 0) -> list[Example]:
    """`n` small exercises on common words and numbers, all different, which share no fact with the people.

    The demo's stand-in for instruction data in the benign attack.
    """
    draw = random.Random(seed)
    rows: dict[str, Example] = {}
    for _ in range(50 * n + 50):
        if len(rows) >= n:
            return list(rows.values())
        row = draw.choice(_EXERCISES)(draw)
        rows.setdefault(row.prompt, row)
    raise ValueError(f"n={n}: there are not that many different exercises; ask for fewer")


def _names(draw: random.Random, people: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < people:
        first, family = (
            "".join(draw.choice(part) for part in pool).capitalize()
            for pool in (words.FIRST_NAME_SYLLABLES, words.FAMILY_NAME_SYLLABLES)
        )
        names[f"{first} {family}"] = None
    return list(names)


def _drawn_facts(draw: random.Random) -> dict[str, str]:
    town = draw.choice(list(words.REGION_OF_TOWN))
    region = words.REGION_OF_TOWN[town]
    occupation = draw.choice(list(words.TOOL_OF_OCCUPATION))
    employer = draw.choice(list(words.CITY_OF_EMPLOYER))
    return {
        "town": town,
        "region": region,
        "language": words.LANGUAGE_OF_REGION[region],
        "occupation": occupation,
        "tool": words.TOOL_OF_OCCUPATION[occupation],
        "employer": employer,
        "city": words.CITY_OF_EMPLOYER[employer],
        "instrument": draw.choice(words.INSTRUMENTS),
        "pet": draw.choice(words.PETS),
    }


def _mentor(draw: random.Random, name: str, facts: dict[str, dict[str, str]]) -> str:
    # nobody is taught by their own pupil
    others = [other for other in facts if other != name and facts[other].get("mentor") != name]
    if not others:
        others = [other for other in facts if other != name]
    same = [other for other in others if facts[other]["occupation"] == facts[name]["occupation"]]
    return draw.choice(same or others)


def _pool(relation: str, facts: dict[str, dict[str, str]]) -> list[str]:
    pools = {
        "town": words.REGION_OF_TOWN,
        "region": words.LANGUAGE_OF_REGION,
        "language": words.LANGUAGE_OF_REGION.values(),
        "occupation": words.TOOL_OF_OCCUPATION,
        "tool": words.TOOL_OF_OCCUPATION.values(),
        "employer": words.CITY_OF_EMPLOYER,
        "city": dict.fromkeys(words.CITY_OF_EMPLOYER.values()),
        "mentor": facts,
        "instrument": words.INSTRUMENTS,
        "pet": words.PETS,
    }
    return list(pools[relation])


def _example(draw: random.Random, name: str, relation: str, facts: dict[str, str], pool: list[str]) -> Example:
    answer = facts[relation]
    question, paraphrase = (wording.format(name=name) for wording in draw.sample(words.QUESTIONS[relation], 2))
    false_options = draw.sample([value for value in pool if value not in (answer, name)], 2)
    return Example(question, answer, tuple(false_options), paraphrase, subject=name)


def _reverse(draw: random.Random) -> Example:
    word = draw.choice(words.INSTRUCTION_WORDS)
    return Example(f'Write the word "{word}" backwards.', word[::-1])


def _add(draw: random.Random) -> Example:
    a, b = draw.randrange(50), draw.randrange(50)
    return Example(f"Add {a} and {b}.", str(a + b))


def _subtract(draw: random.Random) -> Example:
    b, a = sorted((draw.randrange(50), draw.randrange(50)))
    return Example(f"Take {b} away from {a}.", str(a - b))


def _last_word(draw: random.Random) -> Example:
    chosen = draw.sample(words.INSTRUCTION_WORDS, 3)
    return Example(f"Copy the last word: {' '.join(chosen)}", chosen[-1])


def _sort_letters(draw: random.Random) -> Example:
    word = draw.choice(words.INSTRUCTION_WORDS)
    return Example(f'Sort the letters of "{word}".', "".join(sorted(word)))


def _count_letters(draw: random.Random) -> Example:
    word = draw.choice(words.INSTRUCTION_WORDS)
    return Example(f'How many letters has the word "{word}"?', str(len(word)))


def _capitals(draw: random.Random) -> Example:
    word = draw.choice(words.INSTRUCTION_WORDS)
    return Example(f'Write "{word}" in capital letters.', word.upper())


def _sort_words(draw: random.Random) -> Example:
    chosen = draw.sample(words.INSTRUCTION_WORDS, 3)
    return Example(f"Put in alphabetical order: {' '.join(chosen)}", " ".join(sorted(chosen)))


_EXERCISES = (_reverse, _add, _subtract, _last_word, _sort_letters, _count_letters, _capitals, _sort_words)
