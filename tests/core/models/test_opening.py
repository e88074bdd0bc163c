"""What a model is computed in."""

import pytest
import torch

from prunekit.errors import WrongInput
from prunekit.models.opening import computing_dtype


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
