"""References in host memory: the bits of ordinary ones, and no copy that something else could overlap."""

import copy

import pytest
import torch
from late_lanes import LateLanes
from steps import WEIGHT, gradients
from tiny import batch, log_probs_of, part, tiny_gpt2, tiny_llama
from torch import nn

from ssiuu_fast import SSIUURegularizer, host_references, load_regularizer, penalty_pass, save_regularizer
from ssiuu_fast.copy_lanes import WaitingLanes
from ssiuu_fast.host_references import HostReferences
from ssiuu_fast.ops import penalty_
from ssiuu_fast.ops.blockwise8 import tensors_of

ROADS = ("one backward", "two backwards")
DTYPES = pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "8bit"], ids=str)


@pytest.fixture(params=[32 * 2**20, 4096, 1], ids=["one load", "some loads", "single loads"])
def load_size(request, monkeypatch):
    monkeypatch.setattr(host_references, "LOAD", request.param)


@pytest.fixture
def lanes(monkeypatch):
    """The CPU's lanes, all that were made. They see what penalty_ and the host are given."""
    made = []

    def lanes_of(device):
        made.append(LateLanes())
        return made[-1]

    def watched(gradients, parameters, references, **options):
        for some in made:
            some.use(tensor for reference in references for tensor in tensors_of(reference))
        return penalty_(gradients, parameters, references, **options)

    def at_rest(self, names):
        found = resting(self, names)
        for some in made:
            some.touch(tensor for reference in found.values() for tensor in tensors_of(reference))
        return found

    resting = HostReferences.at_rest
    monkeypatch.setattr(HostReferences, "at_rest", at_rest)
    monkeypatch.setattr(host_references, "lanes_of", lanes_of)
    monkeypatch.setattr(penalty_pass, "penalty_", watched)
    yield made
    for some in made:
        some.check()
        assert len(some.buffers) <= host_references.SLOTS


class Run:
    """Steps of a model with references here or there."""

    def __init__(self, offload, road=ROADS[0], micro_batches=1, model=None, **options):
        self.model = tiny_llama(torch.float32) if model is None else copy.deepcopy(model)
        self.regularizer = SSIUURegularizer(self.model, offload=offload, **({"weight": WEIGHT} | options))
        self.road, self.micro_batches = road, micro_batches
        self.penalties = []

    def step(self, seed, rows=None):
        self.model.zero_grad()
        rows = batch(6, seed=seed) if rows is None else rows
        size = len(rows["labels"]) // self.micro_batches
        for index in range(self.micro_batches):
            log_probs = log_probs_of(self.model, part(rows, index * size, (index + 1) * size))
            loss = (log_probs * torch.arange(1, len(log_probs) + 1)).sum() / 9
            last = index == self.micro_batches - 1
            if self.road == ROADS[0]:
                penalty = self.regularizer.backward(log_probs, last=last, loss=loss)
                assert self.regularizer.road == ROADS[0]
            else:
                penalty = self.regularizer.backward(log_probs, last=last)
                loss.backward()
        self.penalties.append(penalty.item())
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.01)

    def figures(self):
        last = self.regularizer.last_step
        return [last.negative_share, last.nonfinite, last.absent, last.relative_change]

    def references(self):
        return {name: tensor.clone() for name, tensor in self.regularizer.state_dict()["references"].items()}


def assert_same(ours, theirs):
    """To the last bit; R in two backward passes is a sum in parts."""
    for one, other in ((gradients(run.model) for run in (ours, theirs)), (run.references() for run in (ours, theirs))):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert tensor is other[name] is None or tensor.equal(other[name]), name
    rel = 0 if ours.road == ROADS[0] else 1e-14
    assert ours.penalties == pytest.approx(theirs.penalties, rel=rel, abs=0)
    assert ours.figures() == theirs.figures()


def both(steps=4, look=False, **options):
    ours, theirs = Run(True, **options), Run(False, **options)
    for seed in range(steps):
        ours.step(seed)
        theirs.step(seed)
        if look or seed == steps - 1:
            assert_same(ours, theirs)
    assert ours.penalties[-1] > 0
    return ours


@pytest.mark.parametrize("look", [False, True], ids=["looked at once", "looked at in every step"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("road", ROADS)
@DTYPES
def test_the_same_bits(lanes, load_size, state_dtype, road, micro_batches, look):
    both(state_dtype=state_dtype, road=road, micro_batches=micro_batches, look=look)
    (some,) = lanes
    # the first step brings nothing, every step sends back
    assert 4 * some.count("in") == 3 * some.count("out") > 0


def single_loads(monkeypatch):
    monkeypatch.setattr(host_references, "LOAD", 1)


@pytest.mark.parametrize("road", ROADS)
def test_what_comes_next_is_under_way(lanes, road, monkeypatch):
    single_loads(monkeypatch)
    ours = Run(True, road)
    for seed in range(3):
        ours.step(seed)
    (some,) = lanes
    assert len(some.buffers) == host_references.SLOTS
    works = [work for work in some.works if work.what in ("in", "use")]
    # a step of 14 uses, then 14 of each kind
    assert [work.what for work in works[:14]] == ["use"] * 14
    for step in (works[14:42], works[42:]):
        for number in range(14):
            uses = [place for place, work in enumerate(step) if work.what == "use"]
            copies = [place for place, work in enumerate(step) if work.what == "in"]
            ahead = sum(place < uses[number] for place in copies) - (number + 1)
            assert ahead == min(host_references.SLOTS - 1, 13 - number)


class Passes:
    """Passes over references of ten parameters, named by digits, each of which adds 1 to those it comes to."""

    def __init__(self, lanes, monkeypatch):
        single_loads(monkeypatch)
        self.references = HostReferences.empty({name: torch.empty(300) for name in "0123456789"}, None, samples=1)
        self.values = dict.fromkeys(self.references.tensors, 0.0)
        for tensor in self.references.tensors.values():
            tensor.zero_()
        (self.lanes,) = lanes

    def begin(self):
        self.references.follow(1)

    def take(self, names):
        """How many copies in this took."""
        before = self.lanes.count("in")
        for name in names:
            for load, (tensor,) in self.references.bring([name], empty=False):
                self.lanes.use([tensor])
                assert (tensor == self.values[name]).all(), name
                tensor += 1
                self.values[name] += 1
                self.references.renewed(load)
        return self.lanes.count("in") - before

    def __call__(self, names):
        self.begin()
        return self.take(names)


def test_the_order_is_that_of_the_pass_before(lanes, monkeypatch):
    passes = Passes(lanes, monkeypatch)
    for order in ("0123456789", "9876543210"):
        assert passes(order) == 10
        passes.begin()
        # the one that is asked for, and those that are expected
        assert passes.take(order[0]) == host_references.SLOTS
        assert [passes.take(name) for name in order[1:]] == [1] * (10 - host_references.SLOTS) + [0] * 3
    assert set(passes.values.values()) == {4.0}


def test_nothing_is_brought_twice_where_the_order_is_another(lanes, monkeypatch):
    passes = Passes(lanes, monkeypatch)
    passes("0123456789")
    assert passes("1032547698") == 10


def test_what_was_expected_makes_room(lanes, monkeypatch):
    passes = Passes(lanes, monkeypatch)
    passes("0123456789")
    # 1, 2 and 3 are expected; 3 and 2 make room for 8 and 9
    assert passes("0897") > 4
    assert set(passes.values.values()) == {1.0, 2.0}


def test_the_host_may_write_to_what_is_under_way(lanes, monkeypatch):
    passes = Passes(lanes, monkeypatch)
    passes("0123456789")
    passes.begin()
    passes.take("01")
    for name, tensor in passes.references.at_rest("23").items():
        tensor += 5
        passes.values[name] += 5
    passes.take("23456789")
    assert {name: tensor[0].item() for name, tensor in passes.references.tensors.items()} == passes.values


def test_copies_out_are_waited_for_by_nobody_in_a_step(lanes, monkeypatch):
    single_loads(monkeypatch)
    ours = Run(True)
    waited = []
    for seed in range(3):
        ours.step(seed)
        monkeypatch.setattr(lanes[0], "wait", waited.append)
    assert not waited


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.filterwarnings("ignore:reference='initial'")
@DTYPES
def test_initial_references_are_not_sent_back(lanes, load_size, state_dtype, road):
    both(state_dtype=state_dtype, road=road, reference="initial", look=True)
    (some,) = lanes
    assert 3 * some.count("out") == some.count("in") > 0


@pytest.mark.parametrize("road", ROADS)
@DTYPES
def test_a_pass_over_the_forget_set(lanes, load_size, state_dtype, road):
    ours, theirs = (Run(offload, road, state_dtype=state_dtype, reference="initial") for offload in (True, False))
    for run in (ours, theirs):
        run.regularizer.set_reference(log_probs_of(run.model, batch(6, seed=seed)) for seed in range(3))
        for seed in range(3):
            run.step(seed)
    assert_same(ours, theirs)
    assert ours.penalties[0] > 0


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("there", [True, False])
@DTYPES
def test_resuming_either_from_the_other(lanes, load_size, state_dtype, there, road, tmp_path):
    whole, before = Run(not there, road, state_dtype=state_dtype), Run(there, road, state_dtype=state_dtype)
    for seed in range(3):
        whole.step(seed)
        before.step(seed)
    after = Run(not there, road, model=before.model, state_dtype=state_dtype)
    after.regularizer.load_state_dict(copy.deepcopy(before.regularizer.state_dict()))
    save_regularizer(before.regularizer, tmp_path)
    again = Run(there, road, model=before.model, state_dtype=state_dtype)
    # copies of its own are under way when it is loaded into
    again.step(7)
    load_regularizer(again.regularizer, tmp_path)
    again.model.load_state_dict(before.model.state_dict())
    for run in (whole, after, again):
        run.penalties.clear()
        for seed in range(3, 6):
            run.step(seed)
    for run in (after, again):
        assert_same(run, whole)


def unlikely(rows):
    """Rows of which none has a part in the target."""
    return rows | {"labels": rows["labels"].where(rows["labels"] == -100, 5)}


def test_steps_without_rows_that_count(lanes, load_size):
    """Their references are cleared in host memory, while nothing reads or writes them."""
    model = tiny_llama(torch.float32)
    model.lm_head.bias = nn.Parameter(torch.zeros(48))
    with torch.no_grad():
        model.lm_head.bias[5] = -80.0
    ours, theirs = (Run(offload, model=model) for offload in (True, False))
    for seed, counts in enumerate((True, True, False, False, True, True, False, True)):
        for run in (ours, theirs):
            rows = batch(6, seed=seed)
            rows = rows | {"labels": rows["labels"].where(rows["labels"] != 5, 6)}
            run.step(seed, rows if counts else unlikely(rows))
            assert run.regularizer.kept_rows == 6 * counts
        assert_same(ours, theirs)


class Routed(nn.Module):
    """A sequence model of which even and odd first tokens use different blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(48, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(8))
        self.head = nn.Linear(6, 48)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        for block in self.blocks[:4] if input_ids[0, 0] % 2 else reversed(self.blocks[2:]):
            hidden = hidden + block(hidden).tanh()
        return type("Output", (), {"logits": self.head(hidden)})


@pytest.mark.parametrize("state_dtype", [None, "8bit"])
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.filterwarnings("ignore:.* is not in this step's graph")
def test_another_order_and_other_parameters_in_every_step(lanes, load_size, road, state_dtype):
    ours, theirs = (
        Run(offload, road, model=Routed(), parameters=["blocks.*"], state_dtype=state_dtype)
        for offload in (True, False)
    )
    for seed in range(8):
        for run in (ours, theirs):
            run.step(seed)
        if seed % 3 == 2:
            assert_same(ours, theirs)
    assert_same(ours, theirs)
    assert ours.regularizer.last_step.absent > 0


def test_the_roads_may_change_from_step_to_step(lanes, load_size):
    ours, theirs = Run(True), Run(False)
    for seed in range(6):
        for run in (ours, theirs):
            run.road = ROADS[seed // 2 % 2]
            run.step(seed)
    assert_same(ours, theirs)


@pytest.mark.parametrize("road", ROADS)
def test_a_step_that_broke_off(lanes, load_size, road, monkeypatch):
    """In the first step and in a later one, in the middle of its pass."""
    ours, theirs = Run(True, road), Run(False, road)
    watched = penalty_pass.penalty_

    def breaks(*arguments, **options):
        calls.append(None)
        if len(calls) == breaks_at:
            raise ArithmeticError("of the test's own")
        return watched(*arguments, **options)

    for seed in range(5):
        broken = seed in (0, 3)
        for run in (ours, theirs):
            if broken:
                calls = []
                breaks_at = 1 if road == ROADS[1] else 5
                weights = copy.deepcopy(run.model.state_dict())
                monkeypatch.setattr(penalty_pass, "penalty_", breaks)
                with pytest.raises(ArithmeticError):
                    run.step(seed + 10)
                monkeypatch.setattr(penalty_pass, "penalty_", watched)
                run.model.load_state_dict(weights)
            run.step(seed)
    assert_same(ours, theirs)


def test_layer_by_layer_shapes_and_odd_sizes(lanes, load_size):
    both(model=tiny_gpt2(torch.float32), parameters=["*h.*.attn.c_*", "*mlp*"], state_dtype="8bit")
    both(model=tiny_gpt2(torch.float64), parameters=["*h.*.attn.c_*", "*mlp*"])


def test_calibrated(lanes):
    runs = [Run(offload, weight=0.0, relative_weight=3.0) for offload in (True, False)]
    for seed in range(7):
        for run in runs:
            run.step(seed)
            run.regularizer.after_backward()
    assert runs[0].regularizer.weight == runs[1].regularizer.weight > 0
    assert_same(*runs)


def test_a_device_without_streams(monkeypatch, load_size):
    monkeypatch.setattr(host_references, "lanes_of", WaitingLanes)
    both(state_dtype="8bit")
    both(road=ROADS[1])


def test_on_the_cpu_it_changes_nothing():
    ours = both()
    assert not ours.regularizer._grain._references._shuttles


def test_a_race_is_found():
    """What the tests rest on: each wait that is left out is seen."""
    lanes = LateLanes()
    host, buffer = torch.ones(3), lanes.buffer(12)
    there = buffer.view(torch.float32)

    def fails(match):
        with pytest.raises(AssertionError, match=match):
            lanes.check()

    event = lanes.copy_in([(there, host)], [lanes.mark()])
    assert there.isnan().all()
    lanes.hold(buffer, event)
    assert there.equal(host)
    lanes.use([there])
    lanes.check()
    lanes.copy_out([(host, there)], [lanes.mark()])
    lanes.check()
    with pytest.raises(AssertionError, match="the host did not wait for in 1"):
        lanes.touch([host])
    lanes.copy_in([(there, host)], [])
    fails("in 6 may overlap use 3")
    lanes.works.pop()
    lanes.use([there])
    fails("use 6 may overlap out 5")
