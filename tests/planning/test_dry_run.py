"""The dry run against formulas written down by hand, and plan's memory against a real run."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from ssiuu_fast.planning.dry_run import LOSS, Workload, attribution, unlearning_step
from ssiuu_fast.planning.live_memory import LiveMemory
from ssiuu_fast.planning.skeleton import Skeleton, llama_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# hidden, queries, keys, MLP, layers, heads, vocabulary
D, Q, K, F, L, H, V = 96, 96, 48, 160, 3, 6, 640
ROWS, LENGTH = 4, 64
TOKENS = ROWS * LENGTH


@pytest.fixture(scope="module")
def skeleton():
    return Skeleton(llama_config(D, L, H, 3, F, V, tied=True))


@pytest.fixture
def checkpointed(skeleton):
    skeleton.checkpoint(True)
    yield skeleton
    skeleton.checkpoint(False)


# docs/memory.md; beside tensors of tokens, a block keeps a mask of its own, and attention a number a token and head
MASK = 4 * ROWS * LENGTH**2
HEADS = 4 * TOKENS * H
# the last norm, and of each token that another follows a row, three indices and a normaliser
FOLLOWED = ROWS * (LENGTH - 1)
ENDS = 4 * TOKENS * 2 * D + FOLLOWED * (4 * D + 3 * 8 + 4)
# what autograd doesn't keep by itself: q, k and v before rotation, o, down
UNKEPT = 4 * TOKENS * (Q + 2 * K + 2 * D)


def test_what_a_block_keeps(skeleton):
    run = unlearning_step(skeleton, Workload(ROWS, ROWS, LENGTH), None)
    block = 4 * TOKENS * (6 * D + 4 * Q + 4 * F) + MASK + HEADS
    assert run.kept == pytest.approx(L * block + ENDS, rel=0.01)


def test_what_a_block_keeps_with_taps_on_its_neurons(skeleton):
    plain = unlearning_step(skeleton, Workload(ROWS, ROWS, LENGTH), None)
    run = unlearning_step(skeleton, Workload(ROWS, ROWS, LENGTH), "neuron")
    assert run.kept - plain.kept == pytest.approx(L * UNKEPT, rel=0.01)


def test_what_a_frozen_block_keeps(skeleton):
    run = attribution(skeleton, Workload(ROWS, ROWS, LENGTH))
    block = 4 * TOKENS * (2 * D + 4 * Q + 3 * F) + UNKEPT + MASK + HEADS
    # the first block's input has no graph, and the final norm keeps its input alone
    assert run.kept == pytest.approx(L * block + 4 * TOKENS * V, rel=0.01)
    assert all(parameter.requires_grad for parameter in skeleton.model.parameters())


def test_logits_are_kept_where_a_model_makes_more_of_them(skeleton):
    from transformers import Gemma2Config

    assert skeleton.head is skeleton.model.lm_head
    sizes = {"hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": H, "head_dim": 16, "vocab_size": V}
    sizes |= {"num_key_value_heads": 3, "intermediate_size": F}
    capped, plain = (Skeleton(Gemma2Config(final_logit_softcapping=cap, **sizes)) for cap in (30.0, None))
    assert capped.head is None and plain.head is plain.model.lm_head
    kept = [unlearning_step(skeleton, Workload(ROWS, ROWS, LENGTH), None).kept for skeleton in (capped, plain)]
    # tanh keeps what it gives, and so does the division of it
    assert kept[0] - kept[1] == pytest.approx(2 * 4 * TOKENS * V, rel=0.1)


def test_what_a_checkpointed_block_keeps(checkpointed):
    run = unlearning_step(checkpointed, Workload(ROWS, ROWS, LENGTH), None)
    # one mask of bytes for all
    assert run.kept == pytest.approx(L * 4 * TOKENS * D + ENDS + MASK / 4, rel=0.02)


def test_operations(skeleton):
    linear = 2 * TOKENS * sum(skeleton.counts.regularized)
    head = 2 * FOLLOWED * V * D
    attention = L * 4 * ROWS * LENGTH**2 * Q
    plain = unlearning_step(skeleton, Workload(ROWS, ROWS, LENGTH), None)
    # a backward pass forms the logits again; an attention's is 2.5 forwards
    assert plain.flops == pytest.approx(2 * (3 * linear + 4 * head + 3.5 * attention), rel=0.001)
    split = unlearning_step(skeleton, Workload(ROWS, ROWS // 2, LENGTH), None)
    assert split.flops == pytest.approx(plain.flops, rel=1e-6)
    penalised = unlearning_step(skeleton, Workload(ROWS, ROWS, LENGTH), "parameter")
    # one product of each regularised weight
    assert penalised.flops - plain.flops == 2 * TOKENS * sum(skeleton.counts.regularized)
    twice = unlearning_step(skeleton, Workload(ROWS, ROWS, LENGTH), "parameter", sharded=True)
    # neither the head's weights nor what is below the first block have a gradient in it
    second = 2 * linear - 2 * TOKENS * D * (Q + 2 * K) + 2 * head + 2.5 * attention
    assert twice.flops - plain.flops == pytest.approx(second, rel=0.001)


def test_a_row_alone_takes_no_product(skeleton):
    plain, penalised = (unlearning_step(skeleton, Workload(4, 1, LENGTH), grain) for grain in (None, "parameter"))
    assert penalised.flops == plain.flops


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_micro_batch_holds_one_weights_gradient_of_the_target(skeleton, checkpointing):
    skeleton.checkpoint(checkpointing)
    try:
        plain, penalised = (
            unlearning_step(skeleton, Workload(ROWS, ROWS, LENGTH), grain) for grain in (None, "parameter")
        )
    finally:
        skeleton.checkpoint(False)
    assert penalised.two_passes == ""
    assert penalised.phases.keys() == plain.phases.keys()
    # and an operand of its product, times the rows' weights
    most = 4 * D * F + 4 * TOKENS * F
    assert 0 <= penalised.phases.pop(LOSS) - plain.phases.pop(LOSS) <= most
    assert penalised.phases == plain.phases


def test_gradients_of_micro_batches():
    """Σg beside the gradients, and in two passes g too, as docs/memory.md says."""
    # activations are next to nothing where a row has two tokens, of few words
    skeleton = Skeleton(llama_config(D, L, H, 3, F, 16, tied=True))
    gradients, g = 4 * skeleton.counts.parameters, 4 * sum(skeleton.counts.regularized)

    def most(batch_size: int, sharded: bool) -> int:
        run = unlearning_step(skeleton, Workload(batch_size, 2, 2), "parameter", sharded=sharded)
        return max(run.phases.values())

    for sharded in (False, True):
        assert most(2, sharded) == pytest.approx(gradients, rel=0.2)
    assert most(4, False) == pytest.approx(gradients + g, rel=0.1)
    assert most(4, True) == pytest.approx(gradients + 2 * g, rel=0.1)


def test_a_model_whose_graph_asks_for_it_takes_two_passes():
    skeleton = Skeleton(llama_config(D, L, H, 3, F, 16, tied=True))
    one = unlearning_step(skeleton, Workload(2, 2, 8), "parameter")
    module = skeleton.model.model.layers[1].mlp.up_proj
    module.forward = lambda hidden: torch.nn.functional.linear(hidden, module.weight)
    run = unlearning_step(skeleton, Workload(2, 2, 8), "parameter")
    assert run.two_passes.startswith("model.layers.1.mlp.up_proj.weight is not, or not only, the weight")
    sharded = unlearning_step(skeleton, Workload(2, 2, 8), "parameter", sharded=True)
    assert run.phases == pytest.approx(sharded.phases, rel=1e-3)
    assert run.flops == sharded.flops > one.flops


@pytest.mark.parametrize("grain", [None, "parameter", "neuron"])
def test_nothing_is_left_behind(skeleton, grain):
    first = unlearning_step(skeleton, Workload(4, 2, 16), grain)
    assert unlearning_step(skeleton, Workload(4, 2, 16), grain) == first
    assert all(parameter.grad is None for parameter in skeleton.model.parameters())


def test_live_memory_counts_storages_once_and_forgets_them():
    with LiveMemory() as memory:
        made = torch.empty(1000)
        view = made[10:]
        assert memory.bytes() == 4000
        del made
        assert memory.bytes() == 4000
        del view
        assert memory.bytes() == 0
        assert memory.peak == 4000
        memory.reset_peak()
        assert torch.ones(3, 5) @ torch.ones(5, 7) is not None
    assert memory.flops == 2 * 3 * 5 * 7


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system doesn't tell a process's peak")
def test_plan_tells_the_peak_of_a_real_run():
    """One case of benchmarks/plan.py, small: resident memory of a process that unlearns."""
    benchmark = load_benchmark()
    shape = {
        "hidden_size": 192,
        "layers": 4,
        "heads": 4,
        "kv_heads": 2,
        "intermediate_size": 512,
        "vocab_size": 4096,
    }
    case = benchmark.Case(shape, "unlearning", 8, 64, micro_batch_size=4, grain="parameter", state_dtype="8bit")
    row = benchmark.compare("small", case)
    assert row.measured_bytes > 50e6
    assert row.ratio == pytest.approx(1, abs=0.1)


def load_benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_of_plan", BENCHMARKS / "plan.py")
    benchmark = importlib.util.module_from_spec(spec)
    # for its dataclasses, and for the neighbours that it imports
    sys.modules[spec.name] = benchmark
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec.loader.exec_module(benchmark)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return benchmark
