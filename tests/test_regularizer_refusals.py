"""What SSIUURegularizer refuses, with a reason and before anything is changed."""

import pytest
import torch
from tiny import batch, log_probs_of, tiny_llama
from torch import nn

from ssiuu_fast import SSIUURegularizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "logit"}, "target must be one of .* got 'logit'"),
        ({"granularity": "layer"}, "granularity must be one of"),
        ({"reference": "first"}, "reference must be one of"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of"),
        ({"state_dtype": torch.float16}, "state_dtype must be one of .*torch.bfloat16, '8bit'; got torch.float16"),
        ({"state_dtype": "8bit"}, "q_proj.weight is torch.float64, .*leave state_dtype='8bit' out"),
        ({"every": 0}, "every must be a whole number of at least 1, got 0"),
        ({"weight": -1.0}, "weight must be a finite number of at least 0"),
        ({"weight": float("nan")}, "weight must be a finite number of at least 0"),
        ({"relative_weight": float("inf")}, "relative_weight must be a finite number"),
        ({"parameters": ["*no_such*"]}, r"pattern '\*no_such\*' matches none of the"),
        ({"parameters": "*weight"}, "list of glob patterns"),
        ({"backend": "fastest"}, "backend must be one of"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        SSIUURegularizer(tiny_llama(), **options)


def test_log_probs_that_are_no_numbers_or_no_batch():
    weight = nn.Parameter(torch.ones(2))
    regularizer = SSIUURegularizer([("w", weight)])
    for log_probs, message in [
        (weight * float("nan"), r"log_probs\[0\] is nan"),
        (weight.sum(), "one number a sample"),
        (weight[:0], "log_probs is empty"),
        (weight.detach(), "no graph"),
    ]:
        with pytest.raises(ValueError, match=message):
            regularizer.backward(log_probs)
    assert weight.grad is None
    assert regularizer.last_step is None


def test_token_counts_are_required_by_the_mean():
    weight = nn.Parameter(torch.ones(2))
    regularizer = SSIUURegularizer([("w", weight)], target="mean_token_probability")
    with pytest.raises(ValueError, match="needs token_counts"):
        regularizer.backward(-weight)
    with pytest.raises(ValueError, match=r"2 numbers above 0, got \[3, 0\]"):
        regularizer.backward(-weight, token_counts=torch.tensor([3, 0]))


def test_scale_must_be_one_through_a_step():
    weight = nn.Parameter(torch.ones(2))
    regularizer = SSIUURegularizer([("w", weight)])
    with pytest.raises(ValueError, match="scale must be a finite number above 0, got 0"):
        regularizer.backward(-weight, scale=0.0)
    regularizer.backward(-weight, scale=2.0, last=False)
    with pytest.raises(ValueError, match=r"from 2\.0 to 4\.0"):
        regularizer.backward(-weight, scale=4.0)


def test_a_freed_graph_names_the_right_order():
    model = tiny_llama()
    regularizer = SSIUURegularizer(model)
    log_probs = log_probs_of(model, batch())
    log_probs.sum().backward()
    with pytest.raises(RuntimeError, match=r"regularizer\.backward\(log_probs\) before loss\.backward\(\)") as error:
        regularizer.backward(log_probs)
    assert "second time" in str(error.value.__cause__)


def test_no_regularised_parameter_in_the_graph():
    model, other = tiny_llama(), tiny_llama()
    regularizer = SSIUURegularizer(model)
    with pytest.raises(RuntimeError, match="0 of 14 regularised parameters are in this graph"):
        regularizer.backward(log_probs_of(other, batch()))


def test_nothing_to_regularise():
    model = tiny_llama()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="none of the 14 selected parameters requires grad"):
        SSIUURegularizer(model)
    with pytest.raises(ValueError, match="no linear module in a numbered block"):
        SSIUURegularizer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no parameters"):
        SSIUURegularizer([])


def broken(weight, value):
    """log-probs whose gradient is `value` at the first element of weight."""

    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return (w * 0).sum().reshape(1) - 1

        @staticmethod
        def backward(ctx, gradient):
            out = torch.full_like(weight, 0.5)
            out[0] = value
            return out

    return Break.apply(weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradients(value):
    sound, weight = nn.Parameter(torch.full((3,), -1.0)), nn.Parameter(torch.full((3,), -1.0))

    def regularizer(nonfinite):
        return SSIUURegularizer([("sound", sound), ("broken", weight)], weight=1.0, nonfinite=nonfinite)

    counting = regularizer("count")
    counting.backward(sound.sum().reshape(1))
    counting.backward(broken(weight, 1.0) + 0 * sound.sum())
    weight.grad = torch.zeros(3)
    before = counting.state_dict()["references"]["broken"].clone()
    with torch.no_grad():
        weight.mul_(2)
    counting.backward(broken(weight, value) + 0 * sound.sum())
    # the broken element adds nothing and keeps its reference, the others go on
    assert counting.last_step.nonfinite == 1
    assert counting.state_dict()["references"]["broken"][0] == before[0]
    assert (counting.state_dict()["references"]["broken"][1:] == 2 * before[1:]).all()
    assert weight.grad[0] == 0
    assert (weight.grad[1:] != 0).all()

    with pytest.raises(FloatingPointError, match=r"non-finite attributions in broken \(1\)"):
        regularizer("raise").backward(broken(weight, value) + 0 * sound.sum())


def test_reference_calls_out_of_place():
    model = tiny_llama()
    with pytest.raises(ValueError, match="for reference='initial'"):
        SSIUURegularizer(model).set_reference([])
    regularizer = SSIUURegularizer(model, reference="initial")
    with pytest.raises(ValueError, match="the forget set is empty"):
        regularizer.set_reference([])
    with pytest.warns(UserWarning, match="without set_reference"):
        regularizer.backward(log_probs_of(model, batch()))
    with pytest.raises(RuntimeError, match="1 steps were taken"):
        regularizer.set_reference([log_probs_of(model, batch())])


def test_unusual_parameters():
    with pytest.raises(ValueError, match="w is not contiguous"):
        SSIUURegularizer([("w", nn.Parameter(torch.ones(2, 3).t()))])
    with pytest.raises(ValueError, match="w is torch.complex64"):
        SSIUURegularizer([("w", nn.Parameter(torch.ones(2, dtype=torch.complex64)))])


def test_wrappers_that_hide_the_gradient():
    with pytest.raises(ValueError, match="DataParallel"):
        SSIUURegularizer(nn.DataParallel(tiny_llama()))

    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    class DeepSpeedEngine(FullyShardedDataParallel):
        pass

    with pytest.raises(ValueError, match="FSDP1"):
        SSIUURegularizer(FullyShardedDataParallel(tiny_llama()))
    with pytest.raises(ValueError, match="DeepSpeedEngine"):
        SSIUURegularizer(DeepSpeedEngine(tiny_llama()))
    partitioned = tiny_llama()
    partitioned.model.layers[0].mlp.up_proj.weight.ds_id = 3
    with pytest.raises(ValueError, match=r"up_proj\.weight is partitioned by DeepSpeed ZeRO-3"):
        SSIUURegularizer(partitioned)


def test_optimizers_that_step_inside_backward():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight has a hook .*lomo, adalomo"):
        SSIUURegularizer(model)


def test_a_step_refused_while_calibrating_may_be_skipped():
    weight = nn.Parameter(torch.full((3,), -1.0))
    regularizer = SSIUURegularizer([("w", weight)], relative_weight=3.0)
    with pytest.raises(FloatingPointError):
        regularizer.backward(broken(weight, float("nan")))
    regularizer.backward(weight.sum().reshape(1))


def test_sharded_parameters(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_llama()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"is a DTensor .* give the model and not its parameters"):
            SSIUURegularizer(model.named_parameters())
        with pytest.raises(ValueError, match="offload=True keeps whole references in host memory.*leave offload out"):
            SSIUURegularizer(model, offload=True)
    finally:
        torch.distributed.destroy_process_group()


def test_modules_that_overwrite_saved_tensors():
    model = tiny_llama()
    swiglu = type(
        "LigerSwiGLUMLP", (type(model.model.layers[0].mlp),), {"__module__": "liger_kernel.transformers.swiglu"}
    )
    model.model.layers[0].mlp.__class__ = swiglu
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp \(LigerSwiGLUMLP\) comes from liger_kernel"):
        SSIUURegularizer(model)


def test_compiled_models_need_their_buffers():
    from torch._functorch import config

    model = tiny_llama(torch.float32)
    # torch's own way to set it: put back by monkeypatch, it is gone for the next one that compiles
    with config.patch(donated_buffer=True):
        torch.compiler.reset()
        compiled = torch.compile(model)
        regularizer = SSIUURegularizer(compiled, weight=1.0)
        assert regularizer.parameter_names[0].startswith("model.layers.0.")
        log_probs_of(compiled, batch()).sum().backward()
        with pytest.raises(RuntimeError, match="donated_buffer = False"):
            regularizer.backward(log_probs_of(compiled, batch()))

    with config.patch(donated_buffer=False):
        torch.compiler.reset()
        log_probs_of(compiled, batch()).sum().backward()
        model.zero_grad()
        regularizer.backward(log_probs_of(compiled, batch()))
        assert regularizer.last_step.negative_share > 0


@pytest.mark.parametrize("granularity", ["parameter", "neuron"])
def test_a_parameter_frozen_after_building(granularity):
    model = tiny_llama()
    regularizer = SSIUURegularizer(model, relative_weight=3.0, granularity=granularity)
    name = "model.layers.1.mlp.up_proj.weight"
    model.get_parameter(name).requires_grad_(False)
    with pytest.raises(RuntimeError, match=rf"{name} was frozen after the regulariser was built: build it after"):
        regularizer.backward(log_probs_of(model, batch()))
    assert all(p.grad is None for p in model.parameters())
    # neurons don't ask for it where λ is known
    if granularity == "neuron":
        SSIUURegularizer(model, granularity="neuron").backward(log_probs_of(model, batch()))


@pytest.mark.parametrize("granularity", ["parameter", "neuron"])
def test_an_item_of_set_reference_in_no_known_form(granularity):
    model = tiny_llama()
    regularizer = SSIUURegularizer(model, reference="initial", granularity=granularity)
    log_probs = log_probs_of(model, batch())
    for item in ([log_probs, None, torch.arange(5)], (), (log_probs,) * 4, {"log_probs": log_probs}):
        with pytest.raises(TypeError, match=r"log_probs, \(log_probs, token_counts\) or \(log_probs, token_counts or"):
            regularizer.set_reference([item])


@pytest.mark.parametrize("granularity", ["parameter", "neuron"])
def test_what_leaves_the_graph_is_warned_of_once(granularity):
    model = tiny_llama(num_hidden_layers=3)
    regularizer = SSIUURegularizer(model, granularity=granularity)
    last = model.model.layers[2]

    def backward():
        regularizer.backward(log_probs_of(model, batch()))
        return regularizer.last_step.absent

    assert backward() == 0
    del model.model.layers[2]
    model.config.num_hidden_layers = 2
    with pytest.warns(UserWarning, match=r"model\.layers\.2\..* not in this step's graph.* 6 others") as s:
        assert backward() == 7
        model.model.layers.append(last)
        model.config.num_hidden_layers = 3
        assert backward() == 0
        del model.model.layers[2]
        model.config.num_hidden_layers = 2
        assert backward() == 7
    assert len([warning for warning in s if "not in this step's graph" in str(warning.message)]) == 1


def test_neurons_of_a_model_without_linear_modules():
    with pytest.raises(ValueError, match="the model has no linear module, whose outputs would be the neurons"):
        SSIUURegularizer(nn.Embedding(2, 2), granularity="neuron")
    with pytest.raises(ValueError, match=r"none of the 1 linear modules is in a numbered block: .* of their weights"):
        SSIUURegularizer(nn.Linear(2, 2), granularity="neuron")
