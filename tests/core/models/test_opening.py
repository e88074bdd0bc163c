"""What a model is computed in."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunekit.errors import WrongInput
from prunekit.models import paging
from prunekit.models.opening import computing_dtype, opened
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


@torch.no_grad()
def test_tables_that_half_precision_rounds_are_those_of_a_model_in_float32(tmp_path: Path) -> None:
    tiny("gemma2").bfloat16().save_pretrained(tmp_path)
    float32, ids = torch.float32, torch.tensor([[3, 1, 4, 1, 5]])
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=float32)
    whole = opened(str(tmp_path), tokenizer=object(), device="cpu").model
    paged, _ = paging.opened(str(tmp_path), lambda _: float32, torch.device("cpu"), bound=0)
    for model in (whole, paged):
        scale = model.get_input_embeddings().embed_scale
        assert scale.dtype == float32
        assert scale == torch.tensor(24.0).sqrt(), "√24 in bfloat16 is 4.906"
        assert torch.equal(model(ids).logits, expected(ids).logits)
