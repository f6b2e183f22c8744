import pytest

from ssiuu_fast.data.example import Example, refuse_overlap, require_rows


def test_overlap_is_counted_and_shown():
    forget = [Example("Who is Ada?", "a baker"), Example("Who is Bo?", "a mason"), Example("Who is Cy?", "a smith")]
    retain = [
        Example(" Who is Ada? ", "a baker"),
        Example("Who is Bo?", "a mason", ("a poet",)),
        Example("Who is Cy?", "a clown"),
    ]
    with pytest.raises(ValueError, match=r"forget\.jsonl and retain set share 2 row\(s\).*'Who is Ada\?' -> 'a baker'"):
        refuse_overlap(forget, retain, "forget.jsonl")


def test_same_question_with_another_answer_or_another_chat_is_no_overlap():
    refuse_overlap([Example("Who is Ada?", "a baker")], [Example("Who is Ada?", "a mason")])
    refuse_overlap([Example("And?", "no", turns=(("user", "Hi"),))], [Example("And?", "no", turns=(("user", "Bye"),))])


def test_a_system_turn_does_not_hide_an_overlap():
    with pytest.raises(ValueError, match="share 1 row"):
        refuse_overlap([Example("Q", "a", turns=(("system", "Be brief."),))], [Example("Q", "a")])


def test_empty_set_is_refused_by_name():
    with pytest.raises(ValueError, match=r"forget set a\.jsonl is empty"):
        require_rows([], "forget set a.jsonl")
