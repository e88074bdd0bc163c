"""A bias in the place of what was removed: FLAP's identity, restored means, and a model that can carry it."""

import pytest
import torch

from prunekit.calibration.twin import Twin
from prunekit.testing import toy_supernet, toy_tokens, toy_workpiece
from prunekit_strategies.finishers.bias import Bias


def outputs(piece):
    """Σ over tokens of the dense model's site inputs and outputs, behind nothing pruned."""
    return {here.site: (here.dense_inputs(0), here.wanted(0, "dense")) for here in Twin(piece, piece.tokens)}


def test_wifv_is_the_error_that_is_left_of_one_column():
    """E‖W x - W_K x_K - b̂‖² = Var(x_j) ‖W_:j‖² when column j alone is removed: Σ over N tokens is N·WIFV_j."""
    net = toy_supernet()
    for gone, keep in ((16, 16), (1, 16)):
        plan = (3, keep, *(s.n_groups for s in net.space.sites[2:]))
        piece = toy_workpiece(net, plan=plan)
        site = piece.sites[1]
        linear = piece.adapter.linear(piece.adapter.blocks(piece.dense)[0], site)
        stays = [g for g in range(17) if g != gone]
        small = piece.adapter.linear(piece.adapter.blocks(piece.model)[0], site)
        small.weight.data = linear.weight.detach()[:, stays].clone()
        object.__setattr__(piece, "kept", (piece.kept[0], tuple(stays), *piece.kept[2:]))
        x, y = (part.flatten(0, 1) for part in outputs(piece)[site])
        Bias().finish(piece)
        left = (y - x[:, stays] @ small.weight.T - small.bias).square().sum()
        wifv = x[:, gone].var(correction=0) * linear.weight[:, gone].square().sum()
        torch.testing.assert_close(left, len(x) * wifv)


def test_it_is_flaps_formula_where_weights_stayed():
    piece = toy_workpiece()
    received = {site: x.flatten(0, 1).mean(0) for site, (x, _) in outputs(piece).items()}
    Bias().finish(piece)
    for site, groups in zip(piece.sites, piece.kept, strict=True):
        dense, small = (
            piece.adapter.linear(piece.adapter.blocks(m)[site.block], site) for m in (piece.dense, piece.model)
        )
        mask = torch.zeros(site.d_in, dtype=torch.float64)
        mask[site.columns(groups)] = 1
        torch.testing.assert_close(small.bias, dense.weight @ (received[site] * (1 - mask)))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_behind_pruned_layers_the_mean_output_is_the_dense_models(family):
    piece = toy_workpiece(toy_supernet(family))
    Bias(inputs="pruned").finish(piece)
    for here in Twin(piece, piece.tokens):
        torch.testing.assert_close(here.made(0).mean((0, 1)), here.wanted(0, "dense").mean((0, 1)))


def test_constant_inputs_are_restored_exactly():
    token = toy_tokens(windows=2, seqlen=1)
    piece = toy_workpiece(tokens=type(token)(token.ids[:1].expand(3, 1), "one token"))
    Bias(inputs="pruned").finish(piece)
    dense, small = (m(piece.tokens.ids, use_cache=False).logits for m in (piece.dense, piece.model))
    torch.testing.assert_close(small, dense)


def test_nothing_removed_nothing_added_but_zeros_and_twice_is_once():
    net = toy_supernet()
    piece = toy_workpiece(net, plan=tuple(s.n_groups for s in net.space.sites))
    assert Bias().finish(piece) == {"parameters_added": 6 * 24}
    added = [p for name, p in piece.model.named_parameters() if name.endswith("bias")]
    assert len(added) == 6
    assert max(float(p.abs().max()) for p in added) < 1e-12
    piece = toy_workpiece(net)
    Bias().finish(piece)
    first = {name: p.clone() for name, p in piece.model.named_parameters()}
    assert Bias().finish(piece) == {"parameters_added": 0}
    for name, p in piece.model.named_parameters():
        torch.testing.assert_close(p, first[name], rtol=0, atol=1e-12)


def test_families_with_biases_pay_nothing():
    assert Bias().finish(toy_workpiece(toy_supernet("opt"))) == {"parameters_added": 0}
