"""What plan counts, what it prints, and what it refuses."""

import json

import pytest
from safetensors.torch import load_file
from tiny import tiny_gpt2, tiny_llama

from ssiuu_fast.cli import main
from ssiuu_fast.host_references import SLOTS, Shuttle, pinned_size, place_size, slot_size
from ssiuu_fast.loop.best import BestWeights
from ssiuu_fast.ops import Blockwise8
from ssiuu_fast.planning.account import reference_bytes, unlearning_need
from ssiuu_fast.planning.devices import PUBLISHED, measured_cpu
from ssiuu_fast.planning.dry_run import Workload
from ssiuu_fast.planning.plan import RUNS, Plan
from ssiuu_fast.planning.plan_options import PlanOptions
from ssiuu_fast.planning.skeleton import Skeleton
from ssiuu_fast.ranks import Ranks
from ssiuu_fast.references import empty_references
from ssiuu_fast.regularizer import SSIUURegularizer

SMALL = ["--hidden_size", "64", "--layers", "2", "--heads", "4", "--vocab_size", "512"]
SMALL += ["--batch_size", "4", "--length", "16"]


def llama(**sizes):
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=128256, num_key_value_heads=8, head_dim=128, **sizes)


def published():
    from transformers import Qwen2Config

    llama_3b = llama(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        tie_word_embeddings=True,
    )
    llama_8b = llama(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        tie_word_embeddings=False,
    )
    qwen_3b = Qwen2Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return {
        "Llama-3.2-3B": (llama_3b, 3_212_749_824, 774_144),
        "Llama-3.1-8B": (llama_8b, 8_030_261_248, 1_376_256),
        "Qwen2.5-3B": (qwen_3b, 3_085_938_688, 1_032_192),
    }


@pytest.mark.parametrize("name", ["Llama-3.2-3B", "Llama-3.1-8B", "Qwen2.5-3B"])
def test_published_totals(name):
    config, parameters, neurons = published()[name]
    counts = Skeleton(config).counts
    assert (counts.parameters, counts.neurons) == (parameters, neurons)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_the_model(make, tied, tmp_path):
    model = make()
    config = model.config
    config.tie_word_embeddings = tied
    model = type(model)(config)
    counts = Skeleton(config).counts
    assert counts.parameters == sum(parameter.numel() for parameter in model.parameters())
    regularizer = SSIUURegularizer(model)
    assert sorted(counts.regularized) == sorted(p.numel() for p in regularizer.regularized_parameters)
    best = BestWeights(model, Ranks.alone())
    best.offer(0.0, step=1, epoch=1.0)
    best.save(tmp_path / "best.safetensors")
    assert counts.copied == sum(tensor.numel() for tensor in load_file(tmp_path / "best.safetensors").values())


def total(references):
    return sum(map(sum, references))


def test_bytes_of_references():
    skeleton = Skeleton(tiny_llama().config)
    sizes = skeleton.counts.regularized
    workload = Workload(4, 4, 8)
    assert total(reference_bytes(skeleton, workload, "parameter", None, None)) == 4 * sum(sizes)
    assert total(reference_bytes(skeleton, workload, "parameter", "bfloat16", None)) == 2 * sum(sizes)
    stored = [Blockwise8.empty_like(p) for p in SSIUURegularizer(tiny_llama()).regularized_parameters]
    eight_bit = sum(reference.codes.nbytes + reference.absmax.nbytes for reference in stored)
    assert total(reference_bytes(skeleton, workload, "parameter", "8bit", None)) == eight_bit
    neurons = skeleton.counts.neurons
    assert total(reference_bytes(skeleton, workload, "neuron", None, 100)) == 4 * neurons
    assert total(reference_bytes(skeleton, Workload(4, 2, 8), "neuron", None, 100)) == 400 * neurons


@pytest.mark.parametrize("state_dtype", [None, "8bit"])
def test_references_in_host_memory(state_dtype):
    skeleton = Skeleton(tiny_llama().config)
    options = {"grain": "parameter", "state_dtype": state_dtype}
    kept, carried = (
        unlearning_need(skeleton, Workload(2, 2, 8), **options, offload=offload) for offload in (False, True)
    )
    parameters = {str(number): p for number, p in enumerate(SSIUURegularizer(tiny_llama()).regularized_parameters)}
    stored = empty_references({name: p.float() for name, p in parameters.items()}, state_dtype)
    # a shuttle makes its slots of this size
    assert carried.states["references"] == SLOTS * Shuttle(stored, None)._slot_size
    # matrices of a power of two, and of 1.5 of it, which the allocator of pinned memory rounds up
    assert kept.offloaded == 0 and kept.states["references"] < carried.offloaded < 2 * kept.states["references"]
    assert (carried.moved, carried.phases) == (kept.moved, kept.phases)
    # GD has none, and neurons keep theirs
    for grain in (None, "neuron"):
        with_it = unlearning_need(skeleton, Workload(2, 2, 8), grain=grain, offload=True)
        assert with_it == unlearning_need(skeleton, Workload(2, 2, 8), grain=grain)


def test_sizes_in_host_memory():
    assert slot_size([2**20] * 64) == 2**25
    assert slot_size([2**20, 2**26]) == 2**26
    assert [place_size([1]), place_size([512, 513])] == [512, 1536]
    assert [pinned_size([2**20]), pinned_size([2**20 + 1, 3])] == [2**20, 2**21 + 4]


def test_weights_in_bf16_are_half_of_it():
    full, half = (Skeleton(tiny_llama().config, dtype) for dtype in ("float32", "bfloat16"))
    needs = [unlearning_need(skeleton, Workload(2, 2, 8), grain="parameter") for skeleton in (full, half)]
    assert [sum(need.states.values()) for need in needs] == [2 * sum(needs[1].states.values())] + [
        sum(needs[1].states.values())
    ]
    assert needs[0].moved == 2 * needs[1].moved


def test_the_states_of_a_step():
    skeleton = Skeleton(tiny_llama().config)
    weights = 4 * skeleton.counts.parameters
    plain = unlearning_need(skeleton, Workload(2, 2, 8), grain=None)
    assert plain.states == {"weights": weights, "AdamW states": 2 * weights}
    assert plain.gradients == weights
    # docs/performance.md, "Elementwise passes": AdamW and two gradients, 48 bytes an element
    assert plain.moved == 12 * weights


@pytest.mark.parametrize(
    ("options", "bytes_an_element"),
    [
        ({}, 28),
        ({"state_dtype": "bfloat16"}, 24),
        ({"sharded": True}, 36),
        ({"sharded": True, "state_dtype": "bfloat16"}, 32),
    ],
)
def test_bytes_that_the_penalty_moves(options, bytes_an_element):
    """docs/performance.md has the table."""
    skeleton = Skeleton(tiny_llama().config)
    n = sum(skeleton.counts.regularized)
    plain, penalised = (
        unlearning_need(skeleton, Workload(2, 2, 8), grain=grain, **given)
        for grain, given in ((None, {}), ("parameter", options))
    )
    assert penalised.moved - plain.moved == bytes_an_element * n


def test_micro_batches_move_their_sums():
    skeleton = Skeleton(tiny_llama().config)
    n = sum(skeleton.counts.regularized)

    def beside_plain(micro_batches: int, sharded: bool) -> int:
        workload = Workload(12, 12 // micro_batches, 8)
        plain, penalised = (
            unlearning_need(skeleton, workload, grain=grain, sharded=sharded) for grain in (None, "parameter")
        )
        return penalised.moved - plain.moved

    # Σg is read and written by each product after the first
    assert [beside_plain(k, False) for k in (2, 3)] == [(28 + 8) * n, (28 + 16) * n]
    # g is written, both are read, Σg is written; the last pass reads and writes what the first loss left
    assert [beside_plain(k, True) for k in (2, 3)] == [(28 + 16) * n, (28 + 32) * n]


def test_only_the_config_of_a_folder_is_read(tmp_path, capsys):
    tiny_llama().config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    assert main(["plan", "--model", str(tmp_path), "--batch_size", "4", "--length", "16", "--rows", "10"]) == 0
    printed = capsys.readouterr().out
    total = sum(parameter.numel() for parameter in tiny_llama().parameters())
    assert f"{total:,} parameters" in printed
    assert "An epoch is 3 steps" in printed
    for device in PUBLISHED:
        assert f"fits {device}" in printed
    assert "at least" in printed and "to make" not in printed


def test_what_does_not_fit_says_what_to_change(capsys):
    flags = ["--memory", "0.0002", "--bandwidth", "1", "--tflops", "1"]
    assert main(["plan", *SMALL, *flags]) == 0
    printed = capsys.readouterr().out
    for change in ("--state_dtype 8bit", "--gradient_checkpointing true"):
        assert change in printed
    assert "none of these" in printed


def test_several_gpus_are_said_to_be_an_estimate(capsys):
    assert main(["plan", *SMALL, "--gpus", "4"]) == 0
    printed = capsys.readouterr().out
    assert "an estimate by formulas, not measured" in printed
    assert "peak of a GPU, sharded" in printed
    assert "the penalty takes a backward pass of its own: the weights are sharded" in printed


def test_sums_of_micro_batches_are_named(capsys):
    assert main(["plan", *SMALL, "--micro_batch_size", "2"]) == 0
    printed = capsys.readouterr().out
    assert "  Σg of micro-batches" in printed
    assert "pass of its own" not in printed
    assert main(["plan", *SMALL, "--micro_batch_size", "1", "--gpus", "2"]) == 0
    assert "  Σg and g of micro-batches" in capsys.readouterr().out


def test_neurons_with_micro_batches_and_checkpoints(capsys):
    flags = ["--granularity", "neuron", "--micro_batch_size", "2", "--gradient_checkpointing", "true"]
    assert main(["plan", *SMALL, *flags]) == 0
    assert "reference=initial" in capsys.readouterr().out


def test_the_cpu_is_measured_and_holds_the_best_weights():
    plan = Plan.of(PlanOptions(hidden_size=64, layers=2, heads=4, vocab_size=512, length=16, device="cpu"))
    assert plan.devices[0].source.startswith("measured here")
    assert "best weights so far" in plan.needs[RUNS[2]].states


def test_a_measured_cpu_has_limits():
    device = measured_cpu()
    assert device.bandwidth > 1e8 and device.flops["float32"] > 1e8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/no/such/model"], "no such model folder"),
        (["--model", "{empty}"], "holds no config.json"),
        (["--model", "{unknown}"], "quantum"),
        (["--model", "{encoder}"], "no causal language model of type 'vit'"),
        (["--model", "{experts}"], "a model of type 'mixtral' has fused experts"),
        (["--model", "{llama}", "--length", "4096"], "the model has 32 positions"),
        (["--hidden_size", "65"], "hidden_size=65 must be a multiple of heads=24"),
        (["--heads", "24", "--kv_heads", "5"], "heads=24 must be a multiple of kv_heads=5"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--length", "1"], "length must be at least 2, got 1"),
        (["--gpus", "9"], "gpus must be at most 8, got 9"),
        (["--gpus", "3"], "batch_size=16 must be a multiple of gpus=3"),
        (["--device", "H1000"], "unknown device 'H1000': one of A100-80"),
        (["--memory", "80"], "give memory, bandwidth and tflops"),
        (["--granularity", "neuron", "--state_dtype", "8bit"], "state_dtype: neurons have small references"),
        (["--granularity", "neuron", "--offload", "true"], "offload: neurons have small references"),
        (["--offload", "true", "--gpus", "2"], "offload works on whole weights"),
        (["--offload", "true", "--device", "cpu"], "offload: on the CPU the references are in host memory anyway"),
    ],
)
def test_nonsense_is_refused_in_one_line(tmp_path, capsys, flags, message):
    for name in ("empty", "unknown", "encoder", "experts", "llama"):
        (tmp_path / name).mkdir()
    (tmp_path / "unknown" / "config.json").write_text(json.dumps({"model_type": "quantum"}))
    (tmp_path / "encoder" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    tiny_llama().config.save_pretrained(tmp_path / "llama")
    (tmp_path / "experts" / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_hidden_layers": 1}))
    names = {folder.name: folder for folder in tmp_path.iterdir()}
    assert main(["plan", *(flag.format(**names) for flag in flags)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1 and error.startswith("ssiuu-fast: ")
