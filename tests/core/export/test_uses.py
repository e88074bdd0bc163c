"""What people do with a model once they have it works with unequal layers as with any others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from prunekit.export import save, to_transformers
from prunekit.layer.candidates import Candidate
from prunekit.models.adapters.find import adapter_for
from prunekit.testing import tiny

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 58], [2, 7, 18, 28, 18, 28, 45, 9, 4]])
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
COUNTS = {"attention": (2, 1, 3), "mlp": (7, 17, 3)}  # of three layers


def pruned(**counts: tuple[int, ...]) -> Any:
    """A Llama whose layers differ."""
    model, adapter = tiny("llama"), adapter_for("llama")
    for site in adapter.sites(model):
        weight = adapter.linear(adapter.blocks(model)[site.block], site).weight.detach()
        kept = (COUNTS | counts)[site.kind][site.block]
        adapter.remove(model, site, Candidate(tuple(range(kept)), weight))
    return to_transformers(model.float(), adapter).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("uneven") / "model"
    save(pruned(), path)
    return path


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_it_drafts_for_the_dense_model_and_changes_none_of_its_tokens(model: Any) -> None:
    dense: Any = tiny("llama").float()
    ids, mask = IDS[:1], torch.ones_like(IDS[:1])
    alone = dense.generate(ids, attention_mask=mask, generation_config=GenerationConfig(**GREEDY))
    helped = dense.generate(
        ids, attention_mask=mask, generation_config=GenerationConfig(**GREEDY), assistant_model=model
    )
    assert torch.equal(alone, helped)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_adapters_of_peft_are_trained_and_merged(model: Any) -> None:
    peft = pytest.importorskip("peft")
    wide = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.SGD([p for p in wide.parameters() if p.requires_grad], lr=0.5)
    losses = list[float]()
    for _ in range(3):
        loss = wide(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        adapted = wide(IDS, use_cache=False).logits
        merged = wide.merge_and_unload()(IDS, use_cache=False).logits
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)


def test_the_trainer_of_transformers_trains_and_saves_it(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in IDS]
    how = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = Trainer(model=model, args=how, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert all(not torch.equal(parameter, before[name]) for name, parameter in loaded.named_parameters())
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.slow
def test_it_is_compiled_as_one_graph(model: Any) -> None:
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)  # what is compiled after it is its own affair
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


def test_continuous_batching_of_transformers_refuses_kv_heads_that_differ(model: Any) -> None:
    with pytest.raises(Exception, match="num_key_value_heads' is a per-layer attribute"):
        model.generate_batch([[3, 4, 5]], generation_config=GenerationConfig(**GREEDY))
