"""Block by block, the gradients are those of the whole model at once."""

import copy
import shutil
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from prunekit import WrongInput
from prunekit.calibration import gradients as gradients_of
from prunekit.calibration.gradients import Gradients, OutputFisher
from prunekit.errors import CannotGoOn
from prunekit.models import blocks as blocks_of
from prunekit.models.adapters.find import adapter_for
from prunekit.system.progress import Progress
from prunekit.testing import tiny, toy_tokens

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in ("llama", "mistral", "qwen2", "qwen3", "opt", "gpt_neox")},  # qwen2 is tied
    "gpt_neox-sequential-tied": ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    "opt-norms-after": ("opt", {"do_layer_norm_before": False}),
    "mistral-sliding": ("mistral", {"sliding_window": 4}),
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(blocks_of, "TOKENS_AT_ONCE", 24)  # two windows at once, the last alone


def collected(model, directory, tokens):
    return Gradients.collected(model, adapter_for(model.config.model_type), tokens, directory, Progress())


def exact(family, **overrides):
    """A tiny model whose norms stay in float64, where the stock ones go through float32."""
    model = tiny(family, **overrides)
    modules: dict[str, Any] = dict(model.named_modules())
    for path, module in modules.items():
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(path, norm)
    return model.requires_grad_(False)


def by_autograd(model, tokens):
    """Per window, the gradient of every parameter, taken through the whole model."""
    model = copy.deepcopy(model).requires_grad_(True)
    names, parameters = zip(*model.named_parameters(), strict=True)
    windows = []
    for window in tokens.ids:
        logits = model(window[None]).logits[0, :-1]
        found = torch.autograd.grad(functional.cross_entropy(logits, window[1:]), parameters, allow_unused=True)
        windows.append(dict(zip(names, found, strict=True)))
    return windows


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_and_fisher_are_those_of_autograd_through_the_whole_model(variant, tmp_path):
    family, overrides = VARIANTS[variant]
    model, adapter, tokens = exact(family, **overrides), adapter_for(family), toy_tokens(5)
    gradients, expected = collected(model, tmp_path, tokens), by_autograd(model, tokens)
    met = set()
    for site in adapter.sites(model):
        for cut in adapter.cuts(adapter.blocks(model)[site.block], site):
            name = f"{adapter.layers}.{site.block}.{cut.path}.weight"
            windows = torch.stack([window[name] for window in expected])
            gradient, fisher = gradients.read(site.block, cut.path, CPU)
            torch.testing.assert_close(gradient, windows.mean(0), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(fisher, windows.square().sum(0) / len(tokens), rtol=1e-9, atol=1e-12)
            met.add(name)
    matrices = {n for n, p in model.named_parameters() if n.startswith(f"{adapter.layers}.") and p.dim() == 2}
    assert met == matrices


def test_a_scale_that_moves_between_up_and_down_moves_no_loss(tmp_path):
    # L(c · up_j, down_:j / c) is constant in c, so Σ w g over row j of up and over column j of down agree
    model = exact("llama")
    gradients = collected(model, tmp_path, toy_tokens())
    block: Any = model.model.layers[1]
    rows = block.mlp.up_proj.weight * gradients.read(1, "mlp.up_proj", CPU)[0]
    columns = block.mlp.down_proj.weight * gradients.read(1, "mlp.down_proj", CPU)[0]
    torch.testing.assert_close(rows.sum(1), columns.sum(0))


def test_a_pass_that_was_killed_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    model = tiny("llama").requires_grad_(False).float()
    collected(model, tmp_path / "whole", toy_tokens())
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for block in (0, 1):
        (tmp_path / "killed" / f"block-{block}.safetensors").unlink()  # blocks are written from the last to the first
    (tmp_path / "killed" / ".block-1.safetensors").write_bytes(b"half of it")
    kept = (tmp_path / "killed" / "block-2.safetensors").stat().st_mtime_ns
    collected(model, tmp_path / "killed", toy_tokens())
    assert (tmp_path / "killed" / "block-2.safetensors").stat().st_mtime_ns == kept
    for block in range(3):
        name = f"block-{block}.safetensors"
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    names = [f"block-{b}.{kind}" for b in range(3) for kind in ("json", "safetensors")]
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == names

    monkeypatch.setattr("prunekit.calibration.gradients.entered", None)  # nothing is run again
    collected(model, tmp_path / "whole", toy_tokens())


def test_half_precision_keeps_gradients_that_are_too_small_for_it(tmp_path):
    model = tiny("llama", num_hidden_layers=1).requires_grad_(False)
    exact = collected(model, tmp_path / "exact", toy_tokens()).read(0, "mlp.down_proj", CPU)
    coarse = collected(model.bfloat16(), tmp_path / "coarse", toy_tokens()).read(0, "mlp.down_proj", CPU)
    for one, two in zip(exact, coarse, strict=True):
        assert two.dtype == torch.float32
        assert float((one - two).norm() / one.norm()) < 0.1


def test_a_damaged_file_is_named(tmp_path):
    gradients = collected(tiny("llama").requires_grad_(False), tmp_path, toy_tokens())
    (tmp_path / "block-1.safetensors").write_bytes(b"")
    with pytest.raises(CannotGoOn, match=r"block-1\.safetensors is missing or damaged; remove"):
        gradients.read(1, "mlp.down_proj", CPU)


def test_windows_of_one_token_are_refused(tmp_path):
    with pytest.raises(WrongInput, match="two tokens or more"):
        collected(tiny("llama").requires_grad_(False), tmp_path, toy_tokens(seqlen=1))


def own_paths(model, adapter):
    return {site: adapter.cuts(adapter.blocks(model)[site.block], site)[-1].path for site in adapter.sites(model)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_fisher_matrix_of_outputs_is_that_of_autograd_through_the_whole_model(variant, tmp_path, monkeypatch):
    family, overrides = VARIANTS[variant]
    model, adapter, tokens = exact(family, **overrides), adapter_for(family), toy_tokens(5)
    drawn, sampled = [], gradients_of.sampled

    def noted(probabilities, generator):
        drawn.append(sampled(probabilities, generator))
        return drawn[-1]

    monkeypatch.setattr(gradients_of, "sampled", noted)
    fisher = fisher_of(model, tmp_path, tokens)
    slopes: dict[str, list[torch.Tensor]] = {}
    for window, labels in zip(tokens.ids, drawn, strict=True):
        outputs: dict[str, torch.Tensor] = {}

        def keep(_module, _args, out, name, outputs=outputs):
            outputs[name] = out
            out.retain_grad()

        hooks = [
            model.get_submodule(site.name).register_forward_hook(partial(keep, name=site.name))
            for site in adapter.sites(model)
        ]
        with torch.enable_grad():
            embedded = model.get_input_embeddings()(window[None]).detach().requires_grad_()
            logits = model(inputs_embeds=embedded).logits[0, :-1]
            functional.cross_entropy(logits, labels, reduction="sum").backward()
        for hook in hooks:
            hook.remove()
        for name, out in outputs.items():
            assert out.grad is not None
            slopes.setdefault(name, []).append(out.grad.reshape(-1, out.shape[-1]))
    for site, path in own_paths(model, adapter).items():
        g = torch.cat(slopes[site.name])
        torch.testing.assert_close(fisher.read(site.block, path, CPU).double(), g.T @ g / len(g), rtol=1e-5, atol=1e-9)


def fisher_of(model, directory, tokens, seed=0):
    adapter = adapter_for(model.config.model_type)
    return OutputFisher.collected(model, adapter, adapter.sites(model), tokens, seed, directory, Progress())


def test_labels_are_drawn_as_the_model_says():
    said = torch.softmax(torch.tensor([0.0, 1.0, -1.0, -30.0]), 0)
    drawn = gradients_of.sampled(said.expand(20_000, 4), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, said, atol=0.01, rtol=0)
    assert torch.equal(drawn, gradients_of.sampled(said.expand(20_000, 4), torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("vocabulary", [1, 4, 256, 257, 1000])
def test_labels_are_where_the_sum_of_all_probabilities_before_reaches_the_draw(vocabulary):
    said = torch.softmax(3 * torch.randn(500, vocabulary, generator=torch.Generator().manual_seed(1)), -1)
    u = torch.rand(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    below = said.double().cumsum(-1)
    plainly = torch.searchsorted(below, u * below[:, -1:]).squeeze(1)
    assert torch.equal(gradients_of.sampled(said, torch.Generator().manual_seed(0)), plainly)


def test_half_the_fisher_form_is_the_divergence_of_a_small_error(tmp_path):
    model, adapter, tokens = exact("llama"), adapter_for("llama"), toy_tokens(6)
    fisher = [fisher_of(model, tmp_path / str(seed), tokens, seed) for seed in range(60)]
    for site, path in own_paths(model, adapter).items():
        linear, scale = model.get_submodule(site.name), 1e-3
        noise = scale * torch.randn(*tokens.ids.shape, site.d_out, generator=torch.Generator().manual_seed(1)).double()
        form = sum(each.read(site.block, path, CPU).double() for each in fisher) / len(fisher)
        foretold = 0.5 * float(torch.einsum("wti,ij,wtj->", noise, form, noise)) / tokens.n_tokens
        dense = torch.log_softmax(model(tokens.ids).logits[:, :-1], -1)
        hook = linear.register_forward_hook(lambda _m, _a, out, noise=noise: out + noise)
        small = torch.log_softmax(model(tokens.ids).logits[:, :-1], -1)
        hook.remove()
        found = float((dense.exp() * (dense - small)).sum()) / tokens.n_tokens
        assert found == pytest.approx(foretold, rel=0.5)


def test_a_fisher_that_was_collected_is_read_again(tmp_path):
    model = exact("llama")
    fisher_of(model, tmp_path, toy_tokens(3))
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    fisher_of(model, tmp_path, toy_tokens(3))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before
