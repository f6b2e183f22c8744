"""Retraining attacks: who is trained on, who is scored, and that the model comes back unchanged."""

import pytest
import torch
from taught import small_task

from ssiuu_fast.evaluation import attacks
from ssiuu_fast.evaluation.attacks import benign_attack, harmful_attack, restored
from ssiuu_fast.evaluation.scores import Scores
from ssiuu_fast.unlearning import unlearn


@pytest.fixture
def watched(monkeypatch):
    """Records what is trained and scored; a row counts as known where it is in `known`."""

    class Watched:
        known: set = set()
        trained: list = []
        scored: list = []

    watched = Watched()

    def score(model, encoder, examples, **_):
        watched.scored.append(list(examples))
        return Scores([float(e in watched.known) for e in examples], "accuracy")

    def finetune(model, rows, *, learning_rate, epochs, after_step=None, after_epoch=None, **_):
        watched.trained.append((learning_rate, rows))
        for epoch in range(1, epochs + 1):
            if after_epoch:
                after_epoch(epoch)
        if after_step:
            for step in range(1, -(-len(rows) // 16) + 1):
                after_step(step, 0.0)

    monkeypatch.setattr(attacks, "score", score)
    monkeypatch.setattr(attacks, "finetune", finetune)
    return watched


class Encoder:
    encode = staticmethod(lambda example: example)


def test_harmful_trains_on_wrong_rows_and_scores_the_other_wrong_ones(watched):
    forget = small_task().split.forget
    watched.known = set(forget[:10])
    attack = harmful_attack(torch.nn.Linear(1, 1), Encoder, forget, 0.3, taught_at=1e-3, seed=0)
    assert [rate for rate, _ in watched.trained] == [1e-3, 5e-4, 1e-4]
    trained, scored = watched.trained[0][1], watched.scored[1]
    assert len(trained) == attack.trained_on == 9
    assert len(scored) == attack.scored_on == 11
    assert set(trained) | set(scored) == set(forget[10:])
    assert attack.before == 0
    # ten epochs at each learning rate
    assert {rate: len(scores) for rate, scores in attack.curves.items()} == {1e-3: 10, 5e-4: 10, 1e-4: 10}


def test_without_the_pool_rule_everything_is_in(watched):
    forget = small_task().split.forget
    watched.known = set(forget)
    attack = harmful_attack(torch.nn.Linear(1, 1), Encoder, forget, 0.1, taught_at=1e-3, seed=0, only_wrong=False)
    assert (attack.trained_on, attack.scored_on, attack.before) == (3, 27, 1.0)


def test_seeds_draw_other_rows(watched):
    forget = small_task().split.forget
    for seed in (0, 0, 1):
        harmful_attack(torch.nn.Linear(1, 1), Encoder, forget, 0.1, taught_at=1e-3, seed=seed)
    first, again, other = (rows for rate, rows in watched.trained if rate == 1e-3)
    assert first == again != other


def test_benign_scores_every_eight_steps_and_at_the_end(watched):
    task = small_task()
    rows = task.instructions * 8  # 320 rows, 20 steps: after 8, 16 and 20
    attack = benign_attack(torch.nn.Linear(1, 1), Encoder, task.split.forget, rows, taught_at=1e-3, seed=0)
    assert list(attack.curves) == [1e-3, 1e-4, 1e-5]
    assert {len(scores) for scores in attack.curves.values()} == {3}
    assert all(scored == task.split.forget for scored in watched.scored)


def test_recovered_is_the_highest_of_all():
    attack = attacks.Attack("x", 1, 1, 0.0, {1.0: [0.1, 0.4, 0.2], 0.5: [0.3, 0.35]})
    assert attack.recovered == 0.4
    assert attack.as_dict()["curves"] == {"1.0": [0.1, 0.4, 0.2], "0.5": [0.3, 0.35]}


def test_too_small_a_pool(watched):
    forget = small_task().split.forget
    watched.known = set(forget[3:])
    with pytest.raises(ValueError, match="trains on 9, and only 3 are in its pool"):
        harmful_attack(torch.nn.Linear(1, 1), Encoder, forget, 0.3, taught_at=1e-3, seed=0)
    for fraction in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            harmful_attack(torch.nn.Linear(1, 1), Encoder, forget, fraction, taught_at=1e-3, seed=0)
    with pytest.raises(ValueError, match="no instructions"):
        benign_attack(torch.nn.Linear(1, 1), Encoder, forget, [], taught_at=1e-3, seed=0)
    with pytest.raises(ValueError, match="must be above 0, got 0"):
        harmful_attack(torch.nn.Linear(1, 1), Encoder, forget, 0.05, taught_at=0, seed=0)


def test_weights_come_back_even_after_an_error():
    model = torch.nn.Linear(2, 2)
    before = model.weight.clone()
    with pytest.raises(KeyboardInterrupt), restored(model):
        model.weight.data.zero_()
        raise KeyboardInterrupt
    assert torch.equal(model.weight, before)


def test_a_real_attack_brings_answers_back(taught):
    model, encoder = taught
    task = small_task()
    unlearn(
        model,
        encoder,
        task.split.forget,
        task.split.retain,
        objective="gd",
        learning_rate=1e-3,
        threshold=0.4,
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attack = harmful_attack(model, encoder, task.split.forget, 0.3, taught_at=1e-3, seed=0)
    # the pool holds what is answered wrongly
    assert attack.before == 0
    assert attack.recovered >= 0.2
    assert all(0 <= s <= 1 for scores in attack.curves.values() for s in scores)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_attack_that_breaks_the_model_brings_nothing_back(taught):
    model, encoder = taught
    forget = small_task().split.forget
    attack = harmful_attack(model, encoder, forget, 0.3, taught_at=float("inf"), seed=0, only_wrong=False)
    assert attack.recovered == 0
