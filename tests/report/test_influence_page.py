"""The page, read without a browser: whole, on its own, and nothing in it that a name put there."""

from html.parser import HTMLParser

import pytest
from studies import made_up

from ssiuu_fast.report import html
from ssiuu_fast.report.influence_page import study_text, verdict_table, write_page

VOID = {"meta", "link", "br", "img", "hr"}
EVIL = '"><script>alert(1)</script><img src=http://x.test/&'


class Checked(HTMLParser):
    """Raises where tags aren't closed in order; keeps ids, addresses and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.tags, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.addresses.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.text += data


def stands_on_its_own(text):
    page = Checked(text)
    assert len(page.ids) == len(set(page.ids))
    # a colour bar is an image in the text itself
    used = {address for address in page.addresses if not address.startswith(("data:,", "data:image/png;base64,"))}
    assert used, page.addresses
    assert not {address for address in used if address[0] != "#" or address[1:] not in page.ids}
    assert not {"script", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert "@import" not in text
    assert "url(http" not in text.replace(" ", "")
    for clip in text.split("url(#")[1:]:
        assert clip.split(")")[0] in page.ids
    return page


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    attack = {"attacked": (0.5, 0.9), "accuracy": (0.9, 0.3, 0.4)}
    studies = [made_up(EVIL, after=(0.2, 0.8), **attack), made_up("Ssiuu", after=(0.8, 1.4), **attack)]
    studies[0].models["before"] = EVIL
    studies[0].notes.append(f"note {EVIL}")
    return studies, write_page(studies, folder, f"Erased or hidden? {EVIL}")


def test_the_page_stands_on_its_own_and_escapes_what_it_shows(written):
    _, path = written
    page = stands_on_its_own(path.read_text(encoding="utf-8"))
    assert page.text.count(EVIL) >= 10
    # for each of two studies and two targets: layers, curves, modules, silenced, attacked; a lens each
    assert page.tags.count("svg") == 2 * 2 * 5 + 2


def test_every_picture_lies_there_with_its_numbers(written):
    _, path = written
    pictures = sorted((path.parent / "pictures").glob("*.svg"))
    assert len(pictures) == 22
    assert all(picture.with_suffix(".csv").stat().st_size for picture in pictures)


def test_the_verdict_comes_first_and_everything_is_there(written):
    studies, path = written
    text = Checked(path.read_text(encoding="utf-8")).text
    order = ["Mostly erased", "How the verdict is reached", "Attributions of P(answer)", "by name", "Settings"]
    places = [text.index(said) for said in order[:2]]
    places += [text.rindex(said) for said in order[2:]]
    assert places == sorted(places)
    for said in ("95 % interval", "share of D− in Q and K", "model.layers.0.self_attn.q_proj[", "sha256", "float32"):
        assert said in text
    assert "Pearson, Spearman ρ: after, attacked" in text


def test_the_same_study_gives_the_same_page(written, tmp_path):
    studies, path = written
    again = write_page(studies, tmp_path, f"Erased or hidden? {EVIL}")
    assert again.read_text(encoding="utf-8") == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("layers", [1, 40])
def test_one_study_without_an_attack(tmp_path, layers):
    study = made_up(after=(1.0, 1.0), layers=layers, kinds=("Q", "down"))
    page = stands_on_its_own(write_page([study], tmp_path, "t").read_text(encoding="utf-8"))
    assert "no neuron gained suppression" in page.text
    assert "nan" not in page.text.split()
    assert page.tags.count("svg") == 9


def test_where_p_vanished_correlations_and_shares_are_undefined(tmp_path):
    study = made_up(after=(0.0, 0.0), attacked=(0.0, 0.0), accuracy=(0.9, 0.3, 0.3))
    text = write_page([study], tmp_path, "t").read_text(encoding="utf-8")
    assert "nan" not in stands_on_its_own(text).text.split()
    rows = {row[0]: row[1:] for row in verdict_table([study])[1]}
    assert rows["Pearson, Spearman ρ: before, after"] == ["undefined, undefined"]
    assert rows["share of D− in Q and K"] == ["undefined"]
    assert "ρ is undefined" in text


def test_the_table_has_a_column_for_each_study(written):
    studies, _ = written
    header, rows = verdict_table(studies)
    assert header == ["", EVIL, "Ssiuu"]
    assert {len(row) for row in rows} == {1, 3}
    said = study_text(studies)
    assert "Ssiuu: " in said
    assert "| verdict" in said


def test_elements_escape():
    for made in (
        html.element("p", EVIL),
        html.listing([EVIL]),
        html.terms([(EVIL, EVIL)]),
        html.table(EVIL, ["", EVIL], [[EVIL, EVIL], [EVIL]]),
        html.page(EVIL, []),
    ):
        page = Checked(made)
        assert EVIL in page.text
        assert not {"script", "img"} & set(page.tags)
