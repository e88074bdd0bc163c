"""Blocks on several devices: everything made of such a model is the same, and nothing mixes two devices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunekit
from prunekit.calibration.gradients import Gradients, OutputFisher
from prunekit.calibration.twin import Twin
from prunekit.demo import MODEL
from prunekit.models import paging
from prunekit.models.adapters.find import adapter_for
from prunekit.models.opening import every_device, opened, stored_as
from prunekit.models.spread import dealt_out, gather, place_of, placed, settle
from prunekit.run import session
from prunekit.run.plan.plan import Stage
from prunekit.system.memory import GIB, Shares
from prunekit.system.progress import Progress
from prunekit.testing import tiny, toy_supernet, toy_tokens, toy_workpiece
from prunekit.testing.devices import pretended_devices

HOST, ONE, TWO = torch.device("cpu"), torch.device("cpu", 0), torch.device("cpu", 1)


def test_pretended_devices_are_as_strict_as_real_ones():
    host = torch.arange(4.0)
    with pretended_devices():
        x, y = host.to(ONE), torch.ones(4, device=TWO)
        assert (x.device, y.device, x.cpu().device) == (ONE, TWO, HOST)
        for mixed in (lambda: x + y, lambda: x + host, lambda: x @ y, lambda: torch.cat([x, y]), lambda: x.add_(y)):
            with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
                mixed()
        assert (x * 2 + torch.tensor(1.0)).tolist() == [1, 3, 5, 7]
        assert torch.equal((x.to(TWO) * y).cpu(), host)
        assert x[torch.tensor([2, 0])].tolist() == [2, 0]  # indices may be on the host
        x.square_()
        assert x[1:].to("cpu").tolist() == [1, 4, 9]
        leaf = y.clone().requires_grad_()
        (leaf * x.to(TWO)).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.device == TWO
        linear = torch.nn.Linear(4, 4)
        tied = torch.nn.ModuleList([linear, torch.nn.Linear(4, 4)])
        tied[1].weight = linear.weight
        tied.to(TWO)
        assert tied[0].weight is tied[1].weight  # type: ignore[union-attr]
        assert linear(y).device == TWO


@pytest.mark.parametrize(
    ("sizes", "devices", "wanted"),
    [
        ([1, 1, 1, 1], 2, [0, 0, 1, 1]),
        ([1, 1, 1], 2, [0, 1, 1]),
        ([5, 1, 1, 1, 1, 1], 2, [0, 1, 1, 1, 1, 1]),
        ([1, 1], 4, [1, 3]),
        ([0, 0], 2, [0, 0]),
        ([3, 3, 3], 1, [0, 0, 0]),
    ],
)
def test_neighbours_stay_together_and_devices_get_about_as_much(sizes, devices, wanted):
    there = [torch.device("cpu", index) for index in range(devices)]
    assert [place.index for place in dealt_out(sizes, there)] == wanted


FAMILIES = ["llama", "qwen2", "opt", "gpt_neox", "mamba"]  # qwen2 is tied


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_two_devices_is_the_model(family):
    model, adapter, ids = tiny(family).requires_grad_(False), adapter_for(family), toy_tokens().ids
    whole = model(ids).logits
    with pretended_devices():
        settle(model, adapter, [ONE, TWO, ONE])
        assert placed(model, adapter) == [ONE, TWO, ONE]
        assert [place_of(block, HOST) for block in adapter.blocks(model)] == [ONE, TWO, ONE]
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert (head.weight is embedding.weight) == model.config.tie_word_embeddings  # type: ignore[union-attr]
        spread = model(ids.to(ONE)).logits
        assert spread.device == ONE
        assert torch.equal(spread.cpu(), whole)
        gather(model, TWO)
        assert torch.equal(model(ids.to(TWO)).logits.cpu(), whole)
    assert not any(block._forward_hooks for block in adapter.blocks(model))


def test_without_what_follows_the_blocks_two_devices_are_mixed(monkeypatch):
    """The check itself: it can fail."""
    with pretended_devices():
        model = tiny("llama")
        monkeypatch.setattr("prunekit.models.spread.spread", lambda *_: None)
        settle(model, adapter_for("llama"), [ONE, TWO, ONE])
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            model(toy_tokens().ids.to(ONE))


@pytest.mark.parametrize("of", ["gradients", "fisher"])
def test_backward_passes_cross_devices(of, tmp_path):
    model, adapter = tiny("llama").requires_grad_(False), adapter_for("llama")
    sites = adapter.sites(model)

    def collected(folder):
        batch = toy_tokens(windows=2)
        if of == "gradients":
            return Gradients.collected(model, adapter, batch, folder, Progress())
        return OutputFisher.collected(model, adapter, sites, batch, 0, folder, Progress())

    collected(tmp_path / "one")
    with pretended_devices():
        settle(model, adapter, [ONE, TWO, ONE])
        two = collected(tmp_path / "two")
        read: Any = two.read(1, "mlp.down_proj", TWO)
        assert {each.device for each in (read if of == "gradients" else [read])} == {TWO}
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_both_models_of_a_finisher_are_where_the_dense_one_is():
    piece = toy_workpiece(toy_supernet("qwen3"))
    wanted = [here.wanted(0, "stream").clone() for here in Twin(piece, piece.tokens)]
    with pretended_devices():
        settle(piece.dense, piece.adapter, [ONE, TWO, ONE])
        settle(piece.model, piece.adapter, [ONE, TWO, ONE])
        for here, other in zip(Twin(piece, piece.tokens), wanted, strict=True):
            assert here.linear.weight.device == (TWO if here.site.block == 1 else ONE)
            assert torch.equal(here.wanted(0, "stream").cpu(), other)
            assert here.made(0).device == here.linear.weight.device


# -- opened -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "llama"
    stored_as(tiny("llama", vocab_size=2048, num_hidden_layers=4), torch.float32).save_pretrained(path)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(path)
    return path


def test_blocks_that_are_read_stay_on_their_devices_as_far_as_they_fit(folder):
    with pretended_devices():
        dense = opened(str(folder), device="cpu:0,cpu:1", shares=Shares(blocks=GIB))
        blocks: Any = dense.adapter.blocks(dense.model)
        pager: Any = paging.pager_of(dense.model)
        assert [block.mlp.down_proj.weight.device for block in blocks] == [ONE, ONE, TWO, TWO]
        assert next(dense.model.parameters()).device == ONE
        pager.clear()
        dense.model(toy_tokens().ids.to(ONE))
        one = pager.pages[0].bytes
        before = pager.reads
        dense.model(toy_tokens().ids.to(ONE))
        assert pager.reads == before  # all of them are there
        pager.bound = one
        pager.clear()
        for index in (0, 2, 0, 2, 1):
            assert blocks[index].mlp.down_proj.weight.device == (ONE if index < 2 else TWO)
        assert pager.reads == before + 3  # one on each device, then 1 in the place of 0
        assert {page.device for page in pager._held} == {ONE, TWO}


def test_what_is_kept_in_the_hosts_memory_is_not_read_from_disk_again(folder, monkeypatch):
    kept, again = opened(str(folder), shares=Shares(blocks=0, host=GIB)), opened(str(folder), shares=Shares(blocks=0))
    ids, reads = toy_tokens().ids, list[str]()
    read = paging.Shards.read
    monkeypatch.setattr(paging.Shards, "read", lambda self, name, *rest: reads.append(name) or read(self, name, *rest))
    with torch.no_grad():
        one = kept.model(ids).logits
        assert not reads  # they were when its fingerprint was taken
        assert torch.equal(one, again.model(ids).logits)
    assert reads


def test_a_model_that_was_loaded_to_two_devices_stays_there(folder):
    ids = toy_tokens().ids
    with torch.no_grad():
        logits = opened(str(folder)).model(ids).logits
    parts = [
        "model.embed_tokens",
        "model.rotary_emb",
        *(f"model.layers.{i}" for i in range(4)),
        "model.norm",
        "lm_head",
    ]
    there = dict(zip(parts, ["cpu:0"] * 4 + ["cpu:1"] * 4, strict=True))
    with pretended_devices(), torch.no_grad():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, device_map=there)
        dense = opened(model, AutoTokenizer.from_pretrained(folder))
        assert placed(dense.model, dense.adapter) == [ONE, ONE, TWO, TWO]
        assert dense.model.lm_head.weight.device == ONE
        assert torch.equal(dense.model(ids.to(ONE)).logits.cpu(), logits)
        assert (model.lm_head.weight.device, model.hf_device_map) == (TWO, there)  # the caller's own is as it was
        assert torch.equal(model(ids.to(ONE)).logits.cpu(), logits)
        assert not any("forward" in vars(module) for module in dense.model.modules())  # which cut copies would run
        alone = opened(model, AutoTokenizer.from_pretrained(folder), device="cpu:1")  # unless another is asked for
        assert {p.device for p in alone.model.parameters()} == {TWO}
        assert torch.equal(alone.model(ids.to(TWO)).logits.cpu(), logits)


def test_an_offloaded_model_is_refused_in_a_sentence(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[1].to("meta")
    with pytest.raises(prunekit.WrongInput, match="is offloaded, say by device_map; name the model's folder instead"):
        opened(model, AutoTokenizer.from_pretrained(folder))


def test_where_no_device_is_named_by_its_number_all_are_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert list(map(str, every_device("auto"))) == ["cuda:0", "cuda:1", "cuda:2"]
    assert list(map(str, every_device("cuda"))) == ["cuda:0", "cuda:1", "cuda:2"]
    assert list(map(str, every_device("cuda:1"))) == ["cuda:1"]
    assert list(map(str, every_device("cuda:2,cuda:0"))) == ["cuda:2", "cuda:0"]


@pytest.mark.parametrize(
    ("free", "own", "blocks"), [(1000, None, 200), (1000, 500, 500), (1000, 601, 200), (0, 10, 0), (-5, None, 0)]
)
def test_the_blocks_of_a_device_come_first_where_they_fit(free, own, blocks):
    shares = Shares.of(free, paged=True, own=own)
    assert shares.blocks == blocks
    assert blocks + shares.hidden + shares.dense + shares.parts + shares.teacher <= max(0, free)
    assert blocks + (shares.activations or 0) + shares.teacher <= max(0, free)


# -- a run --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_on_two_devices_writes_what_a_run_on_one_writes(folder, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, 17 times a day. " * 100)
    asked: dict[str, Any] = {
        "pruner": {"name": "obs", "aim": "stream"},
        "allocator": {"name": "evolution", "generations": 1, "offspring": 2},
        "objective": "divergence",
        **{f"data__{part}_tokens": 32 for part in ("calibration", "search", "evaluation")},
        "data__seqlen": 16,
        "data__dataset": str(tmp_path / "text.txt"),
        "quiet": True,
        "verify": False,
    }
    prunekit.prune(folder, output=tmp_path / "one", **asked)
    plan = session.planned

    def tight(*args, **options):
        found = plan(*args, **options)
        assert found.devices == (ONE, TWO)
        return replace(found, stages=(Stage("open", 0),), shares=Shares(0, 0, 0, 0, 0, 0), limit=GIB)

    monkeypatch.setattr(session, "planned", tight)
    with pretended_devices():
        prunekit.prune(folder, output=tmp_path / "two", device="cpu:0,cpu:1", **asked)
    for name in ("model.safetensors", "config.json", "ledger.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_run_on_two_cuda_devices_writes_what_a_run_on_one_writes(folder, tmp_path, monkeypatch):
    asked: dict[str, Any] = {"recipe": "fast", "data__calibration_tokens": 2048, "data__seqlen": 64, "quiet": True}
    plan = session.planned

    def tight(*args, **options):
        found = plan(*args, **options)
        return replace(found, stages=(Stage("open", 0),), shares=Shares(0, 0, 0, 0, 0, 0), limit=GIB)

    monkeypatch.setattr(session, "planned", tight)
    for name, devices in (("one", "cuda:0"), ("two", "cuda:0,cuda:1")):
        prunekit.prune(folder, output=tmp_path / name, device=devices, dtype="float32", **asked)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
