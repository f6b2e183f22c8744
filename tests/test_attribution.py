"""attribute() against plain autograd, sample by sample."""

import pytest
import torch
from plain_attribution import linear_modules, outputs_and_gradients, plain_means, unpadded
from tiny import batch, exactly, part, tiny_gpt2, tiny_llama, tiny_model

from ssiuu_fast import attribute
from ssiuu_fast.attribution import TARGETS, Site

MODELS = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "qwen2": lambda dtype: tiny_model("qwen2", dtype),
}
# columns of each site in its module's output, written out by hand for the sizes of tiny_model
WHOLE = slice(None)
COLUMNS = {
    "gpt2": {"Q": slice(0, 16), "K": slice(16, 32), "V": slice(32, 48)},
    "phi3": {"Q": slice(0, 16), "K": slice(16, 24), "V": slice(24, 32), "gate": slice(0, 24), "up": slice(24, 48)},
    # [2 heads, 3, 8]
    "gpt_neox": {
        "Q": [*range(0, 8), *range(24, 32)],
        "K": [*range(8, 16), *range(32, 40)],
        "V": [*range(16, 24), *range(40, 48)],
    },
}


def distractors(rows):
    """The batch with a distractor for each sample: the token after the first one of its answer."""
    first = (rows["labels"] != -100).int().argmax(1)
    gold = rows["labels"].gather(1, first[:, None])[:, 0]
    return rows | {"distractors": (gold + 1) % 48}


def assert_matches(found, truth, architecture, bound):
    sites = found.settings["modules"]
    assert {sites[text] for text in sites} == truth.keys()
    for text, path in sites.items():
        site = Site.parse(text)
        columns = COLUMNS.get(architecture, {}).get(site.kind, WHOLE)
        for role, expected in zip(("max", "positive_max", "min"), truth[path], strict=True):
            mine, expected = getattr(found, role)[site], expected[columns]
            assert mine.shape == expected.shape
            error = (mine.double() - expected.double()).abs().max()
            assert error <= bound * expected.abs().max(), (role, text, error)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("architecture", MODELS)
def test_equals_autograd_of_each_sample(architecture, dtype, bound):
    model = exactly(MODELS[architecture](dtype))
    batches = [batch(seed=0), batch(samples=3, seed=1)]
    found = attribute(model, batches)
    # autograd in fp64 is the truth for both
    truth = plain_means(model.double(), batches, linear_modules(model))
    assert found.samples == 8
    assert found.max[Site(0, "Q")].dtype == dtype
    assert_matches(found, truth, architecture, bound)
    # the numbers that were compared aren't all of one sign
    assert (found.max[Site(1, "down")] > 0).any() and (found.min[Site(0, "Q")] < 0).any()


@pytest.mark.parametrize(
    "architecture", ["phi3", "gpt_neox", "phi", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text"]
)
def test_other_architectures(architecture):
    model = tiny_model(architecture)
    rows = batch()
    found = attribute(model, [rows])
    kinds = {site.kind for site in found.max}
    assert kinds >= {"Q", "K", "V", "O", "up", "down"}
    assert_matches(found, plain_means(model, [rows], linear_modules(model)), architecture, 1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_targets(target):
    model = exactly(tiny_llama())
    rows = distractors(batch())
    found = attribute(model, [rows], target=target)
    assert_matches(found, plain_means(model, [rows], linear_modules(model), target), "llama", 1e-9)
    assert found.settings["target"] == target


def test_positions():
    model = exactly(tiny_llama())
    rows = batch()
    counted = {
        "all": lambda row: slice(None),
        "prompt": lambda row: row["labels"] == -100,
        "answer": lambda row: row["labels"] != -100,
        "no_bos": lambda row: slice(1, None),
    }
    for positions, counts in counted.items():
        found = attribute(model, [rows], positions=positions)
        truth = plain_means(model, [rows], linear_modules(model), counts=counts)
        assert_matches(found, truth, "llama", 1e-9)


def test_the_last_token_has_no_attribution():
    model = exactly(tiny_llama()).eval()
    for row in unpadded(batch()):
        for _, gradient in outputs_and_gradients(model, row, linear_modules(model)).values():
            assert (gradient[-1] == 0).all()


def test_a_probability_below_the_dtype_is_attributed():
    """float16 flushes gradients of so small a P to 0; those of log P it holds."""
    model = tiny_llama(torch.float32)
    rows = batch(length=12)
    rows["attention_mask"] = torch.ones_like(rows["input_ids"])
    rows["labels"] = rows["input_ids"].masked_fill(torch.arange(12) < 3, -100)
    found = attribute(model.half(), [rows])
    truth = plain_means(model.double(), [rows], linear_modules(model))
    largest, *_ = truth["model.layers.1.mlp.down_proj"]
    assert 0 < largest.abs().max() < torch.finfo(torch.float16).smallest_normal / 1000
    mine = found.max[Site(1, "down")]
    assert mine.dtype == torch.float32
    assert (mine - largest).abs().max() < 0.1 * largest.abs().max()


def test_underflows_are_counted():
    model = tiny_llama(torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    rows = batch()
    found = attribute(model, [rows])
    assert found.settings["underflows"] == 5
    assert attribute(model, [rows], target="log_probability").settings["underflows"] == 0


def test_a_q_and_k_normed_model_attributes_nothing_to_a_whole_head():
    """The norm undoes the length of a head's q, so Σ over the head of q · ∂T/∂q = 0; likewise k."""
    model = tiny_model("qwen3", rms_norm_eps=0.0).eval()
    exactly(model)
    modules = [f"model.layers.{layer}.self_attn.{part}" for layer in (0, 1) for part in ("q_proj", "k_proj")]
    for row in unpadded(batch()):
        for hidden, gradient in outputs_and_gradients(model, row, modules).values():
            product = (hidden * gradient).view(len(hidden), -1, 8)
            assert product.sum(-1).abs().max() <= 1e-12 * product.abs().max()
    assert "mirror" in attribute(model, [batch()]).settings["notes"][0]
    assert attribute(tiny_llama(), [batch()]).settings["notes"] == []


def test_the_final_residual_attributes_nothing():
    """The final norm undoes the length of the stream: Σ of stream · ∂T/∂stream is 0 at each token. The gradient at the
    last block's down, which is added to the stream, is that of the stream."""
    model = exactly(tiny_llama())
    model.model.norm.variance_epsilon = 0.0
    model.eval()
    stream = []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: stream.append(inputs[0]))
    for row in unpadded(batch()):
        stream.clear()
        (found,) = outputs_and_gradients(model, row, ["model.layers.1.mlp.down_proj"]).values()
        product = stream[0].detach()[0] * found[1]
        assert product.sum(-1).abs().max() <= 1e-12 * product.abs().max()


def test_streaming_over_any_split_gives_the_same():
    model = exactly(tiny_llama())
    rows = batch(samples=7)
    whole = attribute(model, [rows])
    split = attribute(model, (part(rows, start, stop) for start, stop in [(0, 1), (1, 4), (4, 7)]))
    assert split.samples == whole.samples == 7
    assert split.settings == whole.settings
    for site in whole.max:
        for role in ("max", "positive_max", "min"):
            a, b = getattr(whole, role)[site], getattr(split, role)[site]
            assert (a - b).abs().max() <= 1e-12 * a.abs().max()
            a, b = getattr(whole.replicates, role)[site], getattr(split.replicates, role)[site]
            assert (a - b).abs().max() <= 1e-12 * a.abs().max()
    assert (whole.replicates.weights == split.replicates.weights).all()
