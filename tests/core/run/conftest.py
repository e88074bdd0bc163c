"""What tests of whole runs share: settings that make them short, and views of what they leave."""

import random
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

FILES = ("model.safetensors", "config.json", "recipe.yaml", "ledger.jsonl", "tokenizer.json")


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Arguments of a run with a search that takes seconds, with changes: quick(seed=1, last_stride=0.25).

    Its text is short, because most of a short run is to encode a slice of `python-docs`.
    """
    docs = tmp_path_factory.mktemp("text") / "docs.txt"
    docs.write_text("\n".join(topics.values())[:20_000], encoding="utf-8")

    def settings(last_stride: float = 0.125, **changes: Any) -> dict[str, Any]:
        inner = {"name": "evolution", "generations": 2, "offspring": 4}
        tokens = dict.fromkeys((f"data__{part}_tokens" for part in ("calibration", "search", "evaluation")), 512)
        base = {
            "pruner": "obs",
            "allocator": {"name": "tyr", "inner": inner, "last_stride": last_stride},
            "objective": "divergence",
            "data__dataset": str(docs),
            "data__seqlen": 32,
            "quiet": True,
        }
        return base | tokens | changes

    return settings


@pytest.fixture(scope="session")
def numbers() -> Callable[[int], str]:
    """A text of so many random numbers, of one to six digits."""

    def text(words: int) -> str:
        rng = random.Random(0)
        return " ".join(f"{rng.randrange(10 ** rng.randint(1, 6))}" for _ in range(words))

    return text


@pytest.fixture(scope="module")
def folder(saved_tiny: Callable[..., Path], numbers: Callable[[int], str]) -> Path:
    """A tiny model with one embedding, a text beside it; files that need another have a `folder` of their own."""
    path = saved_tiny(intermediate_size=32, tie_word_embeddings=True)
    (path / "text.txt").write_text(numbers(4000))
    return path


@pytest.fixture(scope="session")
def content() -> Callable[[Path], dict[str, bytes]]:
    """The files of a result that the same recipe makes again to the same bytes."""
    return lambda directory: {name: (directory / name).read_bytes() for name in FILES}


@pytest.fixture(scope="session")
def linears() -> Callable[[Path], dict[str, torch.Tensor]]:
    """The weights of all linear maps in the blocks of a model on disk, by name."""

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        blocks: Any = AutoModelForCausalLM.from_pretrained(folder).base_model.get_submodule("layers")
        return {name: m.weight.detach() for name, m in blocks.named_modules() if isinstance(m, torch.nn.Linear)}

    return weights
