"""One unlearning from all sides: hand-made models, and the command on a small model that was really unlearned."""

import csv
import json
import shutil

import planted
import pytest
import torch
from taught import small_task

from ssiuu_fast import Attribution
from ssiuu_fast.cli import main
from ssiuu_fast.data.collate import Encoded
from ssiuu_fast.data.example import Example
from ssiuu_fast.influence_study import TARGETS, notes_on_options, study, with_options
from ssiuu_fast.report import verdict as words
from ssiuu_fast.report.verdict import verdict
from ssiuu_fast.training import finetune


class OneQuestion:
    """Encodes every row as the one question that the models of planted.py know."""

    pad_id, cut_rows = planted.PAD, 0
    answers = {
        "answer": planted.ANSWER,
        "other": planted.OTHER,
        "don't know": planted.DONT_KNOW,
        "answer too": planted.ANSWER,
    }

    def encode(self, example, answer=None):
        token = self.answers[answer or example.answer]
        return Encoded([planted.FILLER, planted.QUESTION, token], [-100, -100, token])


def rows(count=200):
    return [Example(f"question {n}", "answer", false_options=("don't know",)) for n in range(count)]


def planted_study(after, count=200, before=planted.knowing, encoder=OneQuestion, asked=None, batch_size=64, **settings):
    made = {"before": before, "after": after}
    return study(
        "planted",
        {role: role for role in made},
        asked or rows(count),
        lambda place: (made[place](), encoder()),
        ms=(1,),
        batch_size=batch_size,
        progress=False,
        **settings,
    )


def test_a_hidden_answer_is_called_hidden():
    found = planted_study(planted.hiding)
    assert found.accuracy == {"before": 1.0, "after": 0.0}
    assert verdict(found).word in (words.HIDDEN, words.PARTLY_HIDDEN)
    assert "takes accuracy from 0.00 to 1.00" in verdict(found).reasons[0]
    assert found.lens["after"].means[0] > 0.5 > found.lens["after"].means[-1]


def test_knowledge_that_shrank_is_not_called_hidden():
    def suppressed(knowledge):
        """The same weak suppressor before and after."""
        model = planted.hiding(4)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[planted.ANSWER, planted.HIDES] = -0.1
            model.model.layers[0].mlp.down_proj.weight[planted.ANSWER, planted.KNOWS] *= knowledge
        return model

    found = planted_study(lambda: suppressed(0.15), before=lambda: suppressed(1))
    assert found.accuracy == {"before": 1.0, "after": 0.0}
    said = verdict(found)
    assert said.word == words.UNKNOWN
    assert said.reasons[0] == "The sums say hidden, but silencing brings nothing back."


def test_one_row_is_too_few_for_a_word():
    said = verdict(planted_study(planted.erased, count=1))
    assert said.word == words.UNKNOWN
    assert said.reasons == ["Measured on 1 row: fewer than 10 say nothing."]


def test_probabilities_by_token_and_near_1():
    found = planted_study(lambda: planted.knowing(10), before=lambda: planted.knowing(1))
    p = found.probability
    assert found.token_probability == pytest.approx(p)
    assert found.unsureness["before"] == pytest.approx(p["before"] * (1 - p["before"]))
    assert 0 < found.unsureness["after"] < 1e-6


def test_an_erased_answer_is_called_erased():
    found = planted_study(planted.erased)
    assert found.accuracy == {"before": 1.0, "after": 0.0}
    assert verdict(found).word == words.ERASED
    json.dumps(found.as_dict())


def test_nothing_done_is_called_that():
    assert verdict(planted_study(planted.knowing)).word == words.UNCHANGED


def test_attributions_are_saved_before_anything_can_fail(tmp_path):
    def broken():
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        planted_study(broken, folder=tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {f"before-{target}.safetensors" for target in TARGETS}
    assert Attribution.load(tmp_path / "before-probability.safetensors").samples == 200


def test_no_more_sequences_at_once_than_the_batch_size():
    sizes = []

    def counted(build):
        model = build()
        model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
        return model

    planted_study(lambda: counted(planted.hiding), count=10, batch_size=3)
    assert max(sizes) == 3


def test_what_is_undefined_is_null_in_json():
    # nobody's P(answer) is above 0 afterwards
    found = planted_study(lambda: planted.hiding(sure=1e4), count=10)
    assert found.probability["after"] == 0
    numbers = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert numbers["correlations"]["probability"]["before, after"]["pearson"] is None


def test_cut_rows_are_told():
    class Cutting(OneQuestion):
        max_length = 3

        def encode(self, example, answer=None):
            self.cut_rows += example.prompt in ("question 3", "question 5")
            return super().encode(example, answer)

    notes = planted_study(planted.hiding, count=10, encoder=Cutting).notes
    assert "2 of 10 rows are longer than 3 tokens" in notes[0]
    assert not any("longer than" in note for note in planted_study(planted.hiding, count=10).notes)


def test_no_lens_is_said_once():
    def other():
        model = planted.knowing()
        model.config.logit_scale = 2
        return model

    assert sum("no logit lens" in note for note in planted_study(planted.erased, before=other).notes) == 1
    alike = [Example("q", "answer", false_options=("answer too",))] * 3
    notes = planted_study(planted.erased, asked=alike).notes
    assert sum("no logit lens" in note for note in notes) == 1


def test_rows_without_options_are_told_of():
    free = [Example("a", "x"), Example("b", "y", false_options=("z",))]
    assert "1 of 2 rows have no options" in notes_on_options(free)[0]
    assert notes_on_options(with_options(free)) == []


def test_every_row_gets_something_wrong_to_be_told_from():
    free = [Example("a", "x"), Example("b", "y"), Example("c", "z", false_options=("w",))]
    filled = with_options(free)
    assert filled[2] == free[2]
    assert all(row.answer not in row.false_options and len(row.false_options) == 1 for row in filled)
    assert filled == with_options(free)
    assert [row.false_options for row in with_options(free[:2], [Example("d", "q")])] == [("q",), ("q",)]
    with pytest.raises(ValueError, match="give --distractors"):
        with_options([Example("a", "x"), Example("b", "x")])


@pytest.fixture
def checkpoints(taught_folder, taught, tmp_path):
    """Flags with a model before and after gradient ascent on what it is to forget, and a file of that."""
    from ssiuu_fast import models

    model, encoder = taught
    forget = small_task().split.forget
    wrong = [encoder.encode(row, answer=row.false_options[0]) for row in forget]
    finetune(model, wrong, learning_rate=2e-3, epochs=4, seed=0)
    models.save(model, encoder.tokenizer, tmp_path / "run" / "model")
    data = tmp_path / "forget.jsonl"
    data.write_text("".join(json.dumps({"question": r.prompt, "answer": r.answer}) + "\n" for r in forget))
    return ["--before", str(taught_folder), "--after", str(tmp_path / "run" / "model"), "--data", str(data)]


def test_the_command_prints_the_table_and_writes_the_page(checkpoints, taught_folder, tmp_path, capsys):
    output = tmp_path / "influence"
    flags = [*checkpoints, "--attacked", str(taught_folder), "--batch_size", "16", "--positions", "no_bos"]
    assert main(["influence", *flags, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert (output / "table.md").read_text() in printed + "\n"
    # the folder is called model as they all are, its run is called run
    assert "run: " in printed
    assert f"page: {output / 'page.html'}" in printed
    results = json.loads((output / "results.json").read_text())
    assert results["notes"][0].endswith("whatever is known")
    assert results["accuracy"]["before"] > results["accuracy"]["after"]
    assert results["accuracy"]["attacked"] == results["accuracy"]["before"]
    assert results["correlations"]["probability"]["before, attacked"]["pearson"] == pytest.approx(1.0)
    for role in ("before", "after", "attacked"):
        for target in TARGETS:
            saved = Attribution.load(output / f"{role}-{target}.safetensors")
            assert saved.settings["positions"] == "no_bos"
    curves = next((output / "pictures").glob("*-probability-curves.csv"))
    with curves.open() as file:
        drawn = list(csv.DictReader(file))
    assert float(drawn[-1]["D+"]) == pytest.approx(results["totals"]["probability"]["positive"]["sum"])


def test_a_folder_given_as_a_dot_has_a_name(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path / "run" / "model")
    assert main(["influence", *checkpoints, "--after", ".", "--output", str(tmp_path / "influence")]) == 0
    assert json.loads((tmp_path / "influence" / "results.json").read_text())["name"] == "run"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--after", "/no/such/model"], "no such model folder"),
        (["--attacked", "/no/such/model"], "no such model folder"),
        (["--data", "/no/such.jsonl"], "no such"),
        (["--distractors", "people:forgotten"], "unknown split people:forgotten"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--max_length", "5"], "leaves no room for an answer"),
        (["--style", "chat"], "no chat template"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(checkpoints, tmp_path, capsys, flags, message):
    output = tmp_path / "influence"
    assert main(["influence", *checkpoints, *flags, "--output", str(output)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("ssiuu-fast: ") and "Traceback" not in error
    assert not output.exists()


def test_models_that_read_other_tokens_are_refused(checkpoints, tmp_path, capsys):
    from ssiuu_fast import models

    other = models.train_tokenizer(["other words"], 300)
    models.save(models.new_llama(other, hidden_size=8, heads=2, layers=1), other, tmp_path / "other")
    flags = ["--attacked", str(tmp_path / "other"), "--output", str(tmp_path / "influence")]
    assert main(["influence", *checkpoints, *flags]) == 1
    assert "as the same tokens" in capsys.readouterr().err
    assert not (tmp_path / "influence").exists()


@pytest.mark.parametrize(("positions", "status"), [(8, 1), (40, 0)])
def test_all_models_read_as_much_as_the_shortest_has_positions_for(
    checkpoints, taught_folder, tmp_path, capsys, positions, status
):
    short = tmp_path / "short"
    shutil.copytree(taught_folder, short)
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": positions}
    (short / "config.json").write_text(json.dumps(config))
    output = tmp_path / "influence"
    assert main(["influence", *checkpoints, "--attacked", str(short), "--output", str(output)]) == status
    if status:
        assert f"{short} has 8 positions" in capsys.readouterr().err
        assert not output.exists()


def test_models_of_other_sizes_are_refused(checkpoints, taught, tmp_path, capsys):
    from ssiuu_fast import models

    torch.manual_seed(0)
    tokenizer = taught[1].tokenizer
    models.save(models.new_llama(tokenizer, hidden_size=16, heads=2, layers=2), tokenizer, tmp_path / "small")
    flags = ["--after", str(tmp_path / "small"), "--output", str(tmp_path / "influence")]
    assert main(["influence", *checkpoints, *flags]) == 1
    assert "different size" in capsys.readouterr().err
