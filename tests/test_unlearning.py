"""unlearn: a Trainer's run inside another program."""

import pytest
import torch
from taught import RECIPE, load_taught, small_task
from unlearners import config, equal, weights

from ssiuu_fast.evaluation.scores import score
from ssiuu_fast.trainer import UnlearningTrainer
from ssiuu_fast.unlearning import unlearn


def run(taught, **options):
    model, encoder = taught
    split = small_task().split
    settings = {"objective": "gd", "learning_rate": 1e-3, "threshold": 0.4} | options
    return unlearn(model, encoder, split.forget, split.retain, **settings)


def test_it_is_a_run_of_the_trainer(taught_folder, tmp_path):
    rows = []
    model, encoder = load_taught(taught_folder)
    progress = run((model, encoder), penalty={"relative_weight": 3}, log=rows.append, seed=3, max_epochs=4)
    other, _ = load_taught(taught_folder)
    split = small_task().split
    args = config(
        tmp_path, learning_rate=1e-3, threshold=0.4, relative_weight=3, seed=3, num_train_epochs=4,
        per_device_train_batch_size=16, max_length=RECIPE.max_positions,
    )  # fmt: skip
    trainer = UnlearningTrainer(
        other, args, forget=split.forget, retain=split.retain, processing_class=encoder.tokenizer
    )
    trainer.train()
    assert progress == trainer.progress()
    assert equal(weights(model), weights(other))
    assert progress.score == score(model, encoder, split.forget).mean
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert "penalty_share" in rows[1] and "eval_forget_score" in rows[0]


def test_nothing_is_printed_and_nothing_left(taught, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(taught, max_epochs=1)
    printed = capsys.readouterr()
    assert printed.out == "" and "step" not in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [5, 16])
def test_micro_batches_change_nothing(taught_folder, size):
    ends = []
    for micro_batch_size in (None, size):
        model, encoder = load_taught(taught_folder)
        run((model.double(), encoder), max_epochs=2, micro_batch_size=micro_batch_size, penalty={"weight": 100.0})
        ends.append(weights(model))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=0, atol=1e-9)


def test_more_micro_batches_than_rows_are_refused_by_the_name_of_the_option(taught):
    with pytest.raises(ValueError, match="micro_batch_size=1 cuts a batch of 64 into 64 micro-batches.*there are 30"):
        run(taught, batch_size=64, micro_batch_size=1)


def test_a_second_gpu_is_refused():
    class Elsewhere(torch.nn.Module):
        def parameters(self, recurse=True):
            yield type("P", (), {"device": torch.device("cuda:1")})()

    with pytest.raises(ValueError, match="the model is on cuda:1.*set CUDA_VISIBLE_DEVICES=1"):
        unlearn(Elsewhere(), None, [], [], objective="gd", learning_rate=1e-3, threshold=0.3)
