"""A narrower residual stream: the identities, in float64, of every family that has one; sentences for the others."""

from functools import cache
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from prunekit.models.adapters.find import adapter_for
from prunekit.models.width import check_narrow, narrow_shape, narrowed, norms, widths
from prunekit.plugins.adapter import UnsupportedModel
from prunekit.testing import tiny, toy_supernet
from prunekit.testing.models import EXPERTS, MIXERS, SIZES

NARROW = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3")
WIDTH, IDS = 24, torch.arange(40).reshape(2, 20)


def exact(model):
    """Norms that compute in float64: those of transformers compute in float32."""

    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = MethodType(forward, module)
    return model


@torch.no_grad()
def logits(model):
    return exact(model)(IDS, use_cache=False).logits


@cache
def turned(width=WIDTH, seed=0):
    basis, _ = torch.linalg.qr(
        torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    return basis


@cache
def shuffled():
    return torch.randperm(WIDTH, generator=torch.Generator().manual_seed(2))


def model_of(family, *, tied) -> Any:
    """With an eps that is no small number, so that whoever forgets it is found."""
    biased = {"attention_bias": True, "mlp_bias": True} if family in ("llama", "granite") else {}
    return tiny(family, tie_word_embeddings=tied, rms_norm_eps=0.3, **biased)


def silent(model, adapter, channels):
    """The same model, nothing of which writes into some channels of the stream."""
    with torch.no_grad():
        model.get_input_embeddings().weight[:, channels] = 0
        for block in adapter.blocks(model):
            for path in adapter.family.columns.values():
                linear = block.get_submodule(path)
                linear.weight[channels] = 0
                if linear.bias is not None:
                    linear.bias[channels] = 0
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", NARROW)
def test_in_another_basis_of_all_channels_a_model_is_the_same(family, tied):
    model, adapter = model_of(family, tied=tied), adapter_for(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model)
    for directions in (turned(), shuffled()):
        other: Any = narrowed(model, check_narrow(model, adapter), directions, WIDTH, torch.float64)
        torch.testing.assert_close(logits(other), expected, rtol=0, atol=1e-11)
        assert type(other) is type(model)
        shared = other.get_output_embeddings().weight is other.get_input_embeddings().weight
        assert shared == other.config.tie_word_embeddings == (tied and directions.ndim == 1)
        assert not torch.equal(other.get_input_embeddings().weight, model.get_input_embeddings().weight), (
            "another basis"
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("turns", [False, True], ids=["order", "basis"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", NARROW)
def test_without_directions_that_nothing_writes_into_a_model_is_the_same(family, tied, turns):
    model, adapter = model_of(family, tied=tied), adapter_for(family)
    narrow = check_narrow(model, adapter)
    width = widths(model, narrow, 2)[-2]
    directions = shuffled()
    silent(model, adapter, directions[width:])
    if turns:  # the leading directions are any basis of the channels that stay
        directions = torch.eye(WIDTH, dtype=torch.float64)[:, directions]
        directions[:, :width] = directions[:, :width] @ turned(width, 3)
    small: Any = narrowed(model, narrow, directions, width, torch.float64)
    assert width < WIDTH == model.config.hidden_size
    assert small.config.hidden_size == width
    assert small.get_input_embeddings().weight.shape[1] == width
    torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=1e-11)


def test_norm_weights_of_an_order_are_those_of_its_channels_but_for_one_factor_and_maps_are_slices():
    model = model_of("llama", tied=True)
    adapter = check_narrow(model, adapter_for("llama"))
    small: Any = narrowed(model, adapter, shuffled(), 12, torch.float64)
    for here, there in zip(norms(model, adapter), norms(small, adapter), strict=True):
        torch.testing.assert_close(
            there.get_parameter("weight"), here.get_parameter("weight")[shuffled()[:12]] * 2**0.5
        )
    for here, there in zip(model.model.layers, small.model.layers, strict=True):
        assert torch.equal(there.mlp.up_proj.weight, here.mlp.up_proj.weight[:, shuffled()[:12]])
        assert torch.equal(there.mlp.down_proj.weight, here.mlp.down_proj.weight[shuffled()[:12]])
    assert small.config.rms_norm_eps == pytest.approx(2 * model.config.rms_norm_eps)
    assert small.config.head_dim == 4


def test_weights_are_rounded_once_to_the_dtype_of_the_checkpoint():
    model, adapter = tiny("llama"), adapter_for("llama")
    narrow = check_narrow(model, adapter)
    fine, coarse = (narrowed(model, narrow, turned(), 12, dtype) for dtype in (torch.float64, torch.bfloat16))
    for one, two in zip(fine.parameters(), coarse.parameters(), strict=True):
        assert torch.equal(one.to(torch.bfloat16).double(), two)


def test_the_skeleton_of_a_width_has_the_shapes_of_the_model():
    model, adapter = tiny("qwen3", tie_word_embeddings=True), adapter_for("qwen3")
    narrow = check_narrow(model, adapter)
    for directions in (turned(), shuffled()):
        small = narrowed(model, narrow, directions, 16, torch.float64)
        shape = narrow_shape(model, narrow, 16, rotated=directions.ndim == 2)
        assert {name: p.shape for name, p in shape.named_parameters()} == {
            name: p.shape for name, p in small.named_parameters()
        }
        assert all(p.is_meta for p in shape.parameters())


def test_classes_say_which_widths_they_have():
    def of(family, step):
        model, adapter = tiny(family), adapter_for(family)
        return widths(model, check_narrow(model, adapter), step)

    assert of("llama", 2) == [6, 12, 18, 24], "a multiple of its six heads, says the class"
    assert of("mistral", 8) == [8, 16, 24]
    assert of("mistral", 9) == [9, 18, 24], "its own is always one"
    assert of("llama", 8) == [24]


def test_a_model_with_unequal_layers_keeps_them():
    net = toy_supernet()
    plan = net.space.nearest([site.n_groups / (2 + index % 2) for index, site in enumerate(net.space.sites)])
    from prunekit.export.hf import to_transformers

    model = to_transformers(net.assemble(plan), net.adapter)
    assert "Prunekit" in type(model).__name__
    other = narrowed(model, check_narrow(model, net.adapter), turned(), WIDTH, torch.float64)
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=1e-11)
    assert type(other) is type(model)


REFUSED = {
    **dict.fromkeys(("cohere", "stablelm", "starcoder2", "falcon", "opt", "gpt_neox"), "subtract the mean"),
    **dict.fromkeys(("olmo2", "gemma2", "gemma3_text"), "norms of its class stand behind sub-layers"),
    **dict.fromkeys(EXPERTS, "experts and routers are not turned yet"),
    **dict.fromkeys(MIXERS, "its blocks are no attention and MLP"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_families_whose_stream_cannot_be_turned_are_refused_with_the_reason(family):
    with pytest.raises(UnsupportedModel, match=f"type {family!r} stays as it is: .*{REFUSED[family]}.*remove groups"):
        check_narrow(tiny(family), adapter_for(family))


def test_every_family_is_either_narrowed_or_refused():
    assert {*NARROW, *REFUSED} == {*SIZES, *EXPERTS, *MIXERS}


def test_maps_of_low_rank_are_refused():
    net = toy_supernet(structure="low-rank")
    small = net.assemble(net.space.uniform())
    assert any(isinstance(module, nn.Sequential) for module in small.modules())
    with pytest.raises(UnsupportedModel, match="its linear maps are of low rank already"):
        check_narrow(small, net.adapter)
