"""GPT-2 is opened as an OPT model that computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import OPTForCausalLM

from prunekit.errors import WrongInput
from prunekit.models import paging
from prunekit.models.adapters.find import adapter_for
from prunekit.models.opening import opened
from prunekit.plugins.adapter import UnsupportedModel
from prunekit.testing.models import tiny

IDS = torch.tensor([[0, 0, 15, 9, 26, 5], [2, 7, 18, 28, 18, 0]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


@torch.no_grad()
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="as published"),
        pytest.param({"tie_word_embeddings": False, "activation_function": "relu"}, id="untied"),
        pytest.param(
            {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}, id="scores scaled by layer"
        ),
    ],
)
def test_the_opt_model_computes_the_same(overrides: dict[str, Any]) -> None:
    model = tiny("gpt2", **overrides)
    other = adapter_for("gpt2").opened(model)
    assert isinstance(other, OPTForCausalLM)
    assert other.dtype == torch.float64
    mine, theirs = (each(IDS).logits for each in (other, model))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    texts = [
        cast(Any, each).generate(IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False) for each in (other, model)
    ]
    assert torch.equal(*texts)
    unused = 2 * model.config.hidden_size  # positions that OPT counts from 2
    assert other.num_parameters() == model.num_parameters() + unused
    assert other.get_output_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()  # type: ignore[union-attr]


@torch.no_grad()
def test_a_folder_is_opened_as_opt_and_whole(tmp_path: Path) -> None:
    model = tiny("gpt2").float()
    model.save_pretrained(tmp_path)
    for source in (str(tmp_path), model):
        found = opened(source, tokenizer=object(), device="cpu")
        assert found.model.config.model_type == "opt"
        torch.testing.assert_close(found.model(IDS).logits, model(IDS).logits)
        assert len(found.adapter.sites(found.model)) == 6
    with pytest.raises(WrongInput, match="is of type gpt2 and opened as opt, which needs it whole; give --memory"):
        paging.opened(str(tmp_path), lambda _: torch.float32, [torch.device("cpu")], bound=0)


def test_what_no_opt_model_computes_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"none with layer_norm_epsilon 0\.001; it must be 1e-05"):
        adapter_for("gpt2").opened(tiny("gpt2", layer_norm_epsilon=1e-3))
