"""What a model is computed in."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunekit.errors import WrongInput
from prunekit.models import opening, paging
from prunekit.models.adapters.find import adapter_for
from prunekit.models.opening import computing_dtype, opened
from prunekit.system.rates import times_as_fast
from prunekit.testing.models import tiny


@pytest.mark.parametrize(
    ("stored", "device", "computed"),
    [
        (torch.bfloat16, "cpu", torch.float32),  # half precision is slow there
        (torch.bfloat16, "cuda", torch.bfloat16),
        (torch.float64, "cpu", torch.float64),
    ],
)
def test_a_checkpoint_is_computed_as_it_is_stored_or_wider(
    stored: torch.dtype, device: str, computed: torch.dtype
) -> None:
    assert computing_dtype(stored, "auto", torch.device(device)) == computed
    with pytest.raises(
        WrongInput, match="--dtype float16 would round the weights, which are float64; use that or auto"
    ):
        computing_dtype(torch.float64, "float16", torch.device(device))


WIDE = {"hidden_size": 24, "intermediate_size": 2**14, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("ratio", "dtype", "said"),
    [(2.0, "auto", "bfloat16"), (1.9, "auto", "float32"), (9.0, "float32", "float32"), (0.1, "bfloat16", "bfloat16")],
)
def test_bfloat16_is_chosen_where_it_was_measured_to_be_twice_as_fast(
    ratio: float, dtype: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(opening, "times_as_fast", lambda *shape: asked.append(shape) or ratio)
    model, adapter = tiny("llama", **WIDE).bfloat16(), adapter_for("llama")
    assert opening.measured_dtype(model, adapter, dtype, torch.device("cpu")) == said
    assert asked == [(torch.bfloat16, 24, 2048)] * (dtype == "auto")


def test_nothing_is_measured_where_there_is_nothing_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "times_as_fast", None)
    adapter = adapter_for("llama")
    for model, device in [
        (tiny("llama").bfloat16(), "cpu"),  # small
        (tiny("llama", **WIDE), "cpu"),  # float32
        (tiny("llama", **WIDE).half(), "cpu"),
        (tiny("llama", **WIDE).bfloat16(), "cuda"),
    ]:
        assert opening.measured_dtype(model, adapter, "auto", torch.device(device)) == "auto"


def test_measuring_leaves_the_number_of_threads_alone() -> None:
    before = torch.get_num_threads()
    assert times_as_fast(torch.bfloat16, 64, 64, tokens=64, turns=2) > 0
    assert torch.get_num_threads() == before


@torch.no_grad()
def test_tables_that_half_precision_rounds_are_those_of_a_model_in_float32(tmp_path: Path) -> None:
    tiny("gemma2").bfloat16().save_pretrained(tmp_path)
    float32, ids = torch.float32, torch.tensor([[3, 1, 4, 1, 5]])
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=float32)
    whole = opened(str(tmp_path), tokenizer=object(), device="cpu").model
    paged, _ = paging.opened(str(tmp_path), lambda _: float32, [torch.device("cpu")], bound=0)
    for model in (whole, paged):
        scale = model.get_input_embeddings().embed_scale
        assert scale.dtype == float32
        assert scale == torch.tensor(24.0).sqrt(), "√24 in bfloat16 is 4.906"
        assert torch.equal(model(ids).logits, expected(ids).logits)
