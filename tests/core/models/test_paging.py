"""A model whose blocks are read when they are needed is the model, and everything made of it is the same."""

import json
import threading
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import prunekit
from prunekit.demo import MODEL
from prunekit.errors import CannotGoOn
from prunekit.export.verify import answer
from prunekit.models import shards
from prunekit.models.adapters.find import adapter_for
from prunekit.models.blocks import entered
from prunekit.models.opening import opened, stored_as
from prunekit.models.paging import pager_of, shapes_of, whole
from prunekit.run import prune, results, session
from prunekit.run.plan.plan import Stage
from prunekit.run.workplace import written
from prunekit.search.ledger import Ledger
from prunekit.search.store import CandidateStore
from prunekit.system.memory import GIB, Shares
from prunekit.testing import tiny, toy_tokens
from prunekit.testing.models import EXPERTS, HYBRIDS

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "opt", "gpt_neox", "mamba", "mamba2", *EXPERTS, *HYBRIDS]
ONE_BLOCK = Shares(blocks=0, activations=0)
RUN: dict[str, Any] = {
    "pruner": "obs",
    "allocator": {
        "name": "tyr",
        "inner": {"name": "evolution", "generations": 1, "offspring": 2},
        "last_stride": 0.125,
    },
    "objective": "divergence",
    "data__calibration_tokens": 256,
    "data__search_tokens": 256,
    "data__evaluation_tokens": 256,
    "data__seqlen": 32,
    "quiet": True,
    "verify": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(family, dtype, how to save) -> a tiny model with a tokenizer, on disk."""

    def made(family, dtype=torch.bfloat16, vocab_size=61, sizes=None, **saving):
        path = tmp_path_factory.mktemp("tiny") / family
        stored_as(tiny(family, vocab_size=vocab_size, **(sizes or {})), dtype).save_pretrained(path, **saving)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(path)
        return path

    return made


@pytest.mark.parametrize("gone", [False, True])
def test_a_file_that_changes_while_its_model_is_in_use_is_named(gone, folder):
    path = folder("llama")
    blocks = opened(str(path), shares=ONE_BLOCK).model.model.layers
    assert blocks[0].mlp.up_proj.weight.isfinite().all()
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink() if gone else file.write_bytes(content)
    with pytest.raises(CannotGoOn, match=r"model\.safetensors was changed or removed while it was in use"):
        _ = [block.mlp.up_proj.weight for block in blocks]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_paged_model_is_the_model(family, folder):
    path = str(folder(family, max_shard_size="10KB"))
    one, two = opened(path), opened(path, shares=ONE_BLOCK)
    assert (one.fingerprint, one.dtype) == (two.fingerprint, two.dtype)
    assert str(one.model.config) == str(two.model.config)
    assert str(one.model.generation_config) == str(two.model.generation_config)
    tables = dict(one.model.named_buffers())
    assert tables.keys() == dict(two.model.named_buffers()).keys()
    assert all(torch.equal(table, tables[name]) for name, table in two.model.named_buffers())
    ids = toy_tokens().ids
    with torch.no_grad():
        assert torch.equal(one.model(ids).logits, two.model(ids).logits)
        assert torch.equal(whole(two.model)(ids).logits, one.model(ids).logits)
    assert [type(m) for m in whole(two.model).modules()] == [type(m) for m in one.model.modules()]


def test_a_block_is_read_when_a_parameter_is_asked_for_and_let_go_for_the_next(folder):
    dense = opened(str(folder("llama")), shares=ONE_BLOCK)
    blocks: Any = dense.adapter.blocks(dense.model)
    pager = pager_of(dense.model)
    assert pager is not None
    one = sum(p.numel() * p.element_size() for p in blocks[0].parameters())
    pager.clear()
    before = pager.reads
    with shapes_of(dense.model):
        dense.adapter.sites(dense.model)
    entered(dense.model, dense.adapter, toy_tokens().ids)
    assert (pager.held, pager.reads) == (0, before)  # neither shapes nor entering reads a block
    weight = blocks[0].mlp.down_proj.weight
    assert (pager.held, pager.reads) == (one, before + 1)
    assert blocks[0].self_attn.o_proj.weight is blocks[0].self_attn.o_proj.weight
    assert blocks[1].mlp.down_proj.weight.shape == weight.shape
    assert (pager.held, pager.reads) == (one, before + 2)
    assert torch.equal(blocks[0].mlp.down_proj.weight, weight)  # what is held elsewhere stays as it was
    pager.bound = 2 * one
    for index in (0, 1, 0, 2, 0):
        assert blocks[index].mlp.down_proj.weight.device.type == "cpu"
    assert pager.reads == before + 5  # 0 was there, 1 and 2 were read; 0, which was used after 1, is still there
    assert pager.held == 2 * one


def test_a_file_wider_than_its_config_says_is_rounded_as_a_model_opened_whole_is(folder):
    path = folder("llama", torch.float32)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    one, two = opened(str(path)), opened(str(path), shares=ONE_BLOCK)
    assert (one.fingerprint, one.dtype) == (two.fingerprint, two.dtype)
    assert one.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("index", "has no model-0000"),
        ("map", "it is damaged"),
        ("cut", "cannot be read"),
        ("tensor", "lacks model.layers.1"),
        ("nan", "not finite"),
        ("shape", "asks for"),
    ],
)
def test_what_cannot_be_paged_is_refused_in_a_sentence(damage, says, folder):
    path = folder("llama", **({"max_shard_size": "10KB"} if damage in ("index", "map") else {}))
    file = sorted(path.glob("*.safetensors"))[0]
    if damage == "index":
        file.unlink()
    elif damage == "map":
        (path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        tensors, name = load_file(file), "model.layers.1.mlp.up_proj.weight"
        if damage == "tensor":
            del tensors[name]
        elif damage == "shape":
            tensors[name] = tensors[name][:-1].contiguous()
        else:
            tensors[name][0, 0] = torch.nan
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(prunekit.WrongInput, match=says):
        opened(str(path), shares=ONE_BLOCK)


def made(path, output, *, paged, limit=GIB, **changes: Any):
    """A run; paged, it holds one block, no activation and nothing the dense model said, and may take `limit` bytes."""
    plan = session.planned

    def tight(*args, **options):
        return replace(plan(*args, **options), stages=(Stage("open", 0),), shares=Shares(0, 0, 0, 0, 0, 0), limit=limit)

    with pytest.MonkeyPatch.context() as patch:
        if paged:
            patch.setattr(session, "planned", tight)
        return prunekit.prune(path, output=output, **(RUN | changes))


def text_in(folder) -> dict[str, Any]:
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog, 17 times a day. " * 200)
    return {"data__dataset": str(folder / "text.txt")}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"verify": True}),
        # gradients, tied embeddings, dropped sub-layers
        ("qwen2", {"pruner": "llm-pruner", "sparsity": 0.8, "allocator": "softmax", "objective": "expected-error"}),
        pytest.param(
            "gpt_neox", {"structure": "weights", "pruner": "wanda", "allocator": "uniform"}, marks=pytest.mark.slow
        ),
        pytest.param(
            "qwen2", {"structure": "low-rank", "pruner": "svd-llm", "allocator": "uniform"}, marks=pytest.mark.slow
        ),
        ("mamba", {"structure": "weights", "pruner": "wanda", "allocator": "uniform"}),
        # another mixer than attention, with a convolution that is cut
        pytest.param("lfm2", {"pruner": "wanda", "allocator": "uniform", "sparsity": 0.3}, marks=pytest.mark.slow),
        pytest.param("qwen3_next", {"sparsity": 0.3}, marks=pytest.mark.slow),
        ("mixtral", {"sparsity": 0.3}),
        pytest.param("qwen2_moe", {"sparsity": 0.3, "experts": "neurons"}, marks=pytest.mark.slow),
        pytest.param("gpt_oss", {"sparsity": 0.3, "allocator": "uniform"}, marks=pytest.mark.slow),
        pytest.param(
            "opt",
            {"finishers": ["bias"], "allocator": "softmax", "objective": "expected-error"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_paged_run_writes_what_an_unpaged_one_writes(family, changes, folder, tmp_path):
    path = folder(family, torch.float32 if family == "llama" else torch.bfloat16, vocab_size=2048)
    changes = changes | text_in(tmp_path)
    one = made(path, tmp_path / "one", paged=False, **changes)
    two = made(path, tmp_path / "two", paged=True, limit=1, **changes)
    assert (pager_of(two.model) is None) == ("finishers" in changes)  # those have the small model whole
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "two").iterdir())
    # a paged model writes no text, so that what is kept of its answers is less
    for name in set(names) - {"report.json", "README.md", "files.json", "judged"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    reports = [json.loads((tmp_path / which / "report.json").read_text()) for which in ("one", "two")]
    assert [report.pop("seconds") for report in reports]
    assert reports[0] == reports[1]
    assert not list(tmp_path.glob("*.partial"))
    if not changes.get("verify"):
        two.save(tmp_path / "again")
        saved = [(tmp_path / where / "model.safetensors").read_bytes() for where in ("two", "again")]
        assert saved[0] == saved[1]
    ids = toy_tokens(vocabulary=61).ids
    with torch.no_grad():
        # experts one after another in both, as in a run
        first, second = (adapter_for(m.config.model_type).prepare(m.float()) for m in (one.model, whole(two.model)))
        assert torch.equal(first(ids).logits, second(ids).logits)


def test_what_does_not_fit_is_verified_block_by_block(folder, tmp_path):
    path, ids = folder("qwen3"), toy_tokens().ids
    with torch.no_grad():
        logits = opened(str(path)).model(ids).logits
    found, _ = answer({"ids": ids, "logits": logits}, str(path), "AutoModelForCausalLM", "0", "", "0")
    assert (found["difference"], found["parameters"]) == (0, sum(p.numel() for p in tiny("qwen3").parameters()))


def test_a_paged_result_is_compared_with_the_network_that_was_judged(folder, tmp_path, monkeypatch):
    whole_one = results.hf.paged

    def lossy(*args: Any) -> Any:
        small = whole_one(*args)
        small.model.norm.weight = torch.nn.Parameter(small.model.norm.weight + 1, requires_grad=False)
        return small

    path = folder("llama", vocab_size=2048)
    changes: dict[str, Any] = text_in(tmp_path) | {"pruner": "magnitude", "allocator": "uniform", "verify": True}
    monkeypatch.setattr(results.hf, "paged", lossy)
    with pytest.raises(CannotGoOn, match=r"the result was not kept: logits of .* differ"):
        made(path, tmp_path / "out", paged=True, limit=1, **changes)
    monkeypatch.undo()
    bfloat = {"dtype": "bfloat16"}  # what was judged in half precision is expected in float32
    assert made(path, tmp_path / "out", paged=True, limit=1, overwrite=True, **changes, **bfloat).directory


def test_a_model_that_does_not_fit_needs_a_folder_for_the_result(folder):
    with pytest.raises(prunekit.WrongInput, match="needs a folder for the result"):
        made(folder("llama"), None, paged=True)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, GIB])
def test_a_paged_family_is_the_unpaged_one_member_by_member(limit, folder, tmp_path):
    path, names = folder("qwen2", vocab_size=2048), ["0.2", "0.4"]
    changes: dict[str, Any] = text_in(tmp_path) | {"sparsity": [0.4, 0.2], "pruner": "magnitude"}
    made(path, tmp_path / "one", paged=False, **changes)
    two = made(path, tmp_path / "two", paged=True, limit=limit, **changes)
    for name in names:
        for file in ("model.safetensors", "config.json", "recipe.yaml", "ledger.jsonl"):
            assert (tmp_path / "one" / name / file).read_bytes() == (tmp_path / "two" / name / file).read_bytes(), file
    told = [json.loads((tmp_path / which / "pareto.json").read_text()) for which in ("one", "two")]
    for document in told:
        for row in (document, *document["members"]):
            assert row.pop("seconds") > 0
    assert told[0] == told[1]
    models = [member.model for member in two.members]
    assert [pager_of(model) is None for model in models] == [limit > 1] * 2  # whole where there is room for all of them
    ids = toy_tokens(vocabulary=61).ids
    with torch.no_grad():
        for name, model in zip(names, models, strict=True):
            assert torch.equal(
                model(ids).logits, opened(str(tmp_path / "one" / name), dtype="bfloat16").model(ids).logits
            )


def test_a_paged_run_that_was_killed_goes_on_to_the_same_bytes(folder, tmp_path, killed_at):
    path = folder("llama", vocab_size=2048)
    changes: dict[str, Any] = text_in(tmp_path) | {"pruner": "magnitude"}
    made(path, tmp_path / "whole", paged=False, **changes)
    partial = tmp_path / "out.partial"
    # in a walk, in a search, in the middle of the weights, before the rename
    for place, name, last in (
        (CandidateStore, "put", 3), (Ledger, "answer", 2), (shards, "_written", 1), (prune, "publish", 1)
    ):  # fmt: skip
        with killed_at(place, name, last):
            made(path, tmp_path / "out", paged=True, **changes)
        assert not (tmp_path / "out").exists()
        assert written(tmp_path / "out") == sum(f.stat().st_size for f in partial.rglob("*") if f.is_file()) > 0
    made(path, tmp_path / "out", paged=True, **changes)
    for file in ("model.safetensors", "config.json", "recipe.yaml", "ledger.jsonl"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert not partial.exists()
    assert written(tmp_path / "out") == 0


def asked(dense: Any, *indices: int) -> list[str]:
    """Reads of blocks, in order, when these are asked for one after the other; `+` where nobody had asked yet."""
    blocks: Any = dense.adapter.blocks(dense.model)
    pager: Any = pager_of(dense.model)
    seen, lock = list[str](), threading.Lock()
    for index, page in enumerate(pager.pages):
        page.read = partial(noted, page.read, index, seen, lock)
    for index in indices:
        with lock:
            seen.append(f"?{index}")
        assert blocks[index].mlp.down_proj.weight.device.type == "cpu"
        if pager._ahead is not None:
            pager._ahead[1].result()
    return seen


def noted(read: Any, index: int, seen: list[str], lock: Any) -> Any:
    with lock:
        seen.append(str(index))
    return read()


@pytest.fixture
def roomy(folder):
    """Of five blocks, with room for three."""
    dense = opened(str(folder("llama", sizes={"num_hidden_layers": 5})), shares=ONE_BLOCK)
    pager: Any = pager_of(dense.model)
    pager.clear()
    pager.bound = 3 * pager.pages[0].bytes
    return dense, pager


def test_where_three_blocks_fit_the_next_is_read_ahead(roomy):
    dense, pager = roomy
    before = pager.reads
    assert asked(dense, 0, 1, 2) == ["?0", "0", "1", "?1", "2", "?2", "3"]
    assert pager.held == pager.bound  # 1 and 2, and 3 which nobody has asked for
    assert pager.reads == before + 3


def test_what_came_after_the_last_time_is_read_ahead(roomy):
    # one by one when the model was opened; then 3 came after 0
    assert asked(roomy[0], 0, 3, 1, 2, 0) == ["?0", "0", "1", "?3", "3", "4", "?1", "1", "2", "?2", "?0", "0", "3"]


def test_what_cannot_be_read_ahead_is_said_when_it_is_asked_for(roomy):
    dense, pager = roomy
    blocks: Any = dense.adapter.blocks(dense.model)

    def broken():
        raise OSError("no such disk")

    pager.pages[1].read = broken
    assert blocks[0].mlp.down_proj.weight.device.type == "cpu"
    with pytest.raises(OSError, match="no such disk"):
        assert blocks[1].mlp.down_proj.weight.device.type == "cpu"
