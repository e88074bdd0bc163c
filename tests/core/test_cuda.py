"""The whole flow on a CUDA device; the same groups as on the CPU."""

import pytest
import torch
from transformers import AutoTokenizer

import prunekit
from prunekit.demo import MODEL


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("aim", ["own", "stream"])
def test_a_run_on_cuda_keeps_what_a_run_on_the_cpu_keeps(aim):
    data = {"dataset": "python-docs", "seqlen": 128, "calibration_tokens": 8192, "search_tokens": 2048}
    kept = {}
    for device in ("cpu", "cuda"):
        result = prunekit.prune(
            MODEL,
            AutoTokenizer.from_pretrained(MODEL),
            recipe="fast",
            pruner={"name": "obs", "aim": aim},
            device=device,
            dtype="float32",
            data=data,
            quiet=True,
        )
        kept[device] = [site["kept"] for site in result.report["sites"]]
    assert kept["cuda"] == kept["cpu"]
