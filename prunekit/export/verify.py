"""Proof that an exported directory is the model that was promised: load it elsewhere and compare.

Elsewhere is a fresh Python process without network that runs this file alone. It loads the directory
as a user would: with its bundled code, or after `import prunekit`, or with transformers only.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor

    from prunekit.plugins.exporter import Inquiry, Response

TOLERANCE = 1e-4  # of a logit, computed in float32


@dataclass(frozen=True)
class Verified:
    """What the fresh process found."""

    parameters: int  # tied ones counted once
    difference: float  # largest |Δ logit|
    model_class: str


def verify(
    directory: str | Path,
    probe_ids: Int64[Tensor, "windows length"],
    expected_logits: Float[Tensor, "windows length vocabulary"],
    expected_parameters: int,
    tolerance: float = TOLERANCE,
    *,
    blocks: int | None = None,
    trust_remote_code: bool = False,
) -> Verified:
    """Load `directory` in a fresh process; its logits on `probe_ids` must be within `tolerance` of the expected.

    It computes in the dtype of `expected_logits`. Take them from the model in float32, into which saved
    bfloat16 goes exactly: computing in bfloat16, the number of threads alone moves logits by 1/256.
    With `blocks`, what does not fit memory is opened by `prunekit.paging`, within as many bytes of blocks.
    Bundled code that is prunekit's own, byte for byte, runs; other code only with `trust_remote_code`.

    Raises:
        NotVerified: it does not load, the parameter count is not exact, or logits differ.
    """
    from prunekit.errors import NotVerified  # here, because the fresh process runs this file without prunekit

    directory = Path(directory)
    told, _ = _asked(
        directory, {"ids": probe_ids, "logits": expected_logits}, blocks=blocks, trust_remote_code=trust_remote_code
    )
    found = Verified(**told)
    if found.parameters != expected_parameters:
        raise NotVerified(f"{directory} has {found.parameters:,} parameters, not {expected_parameters:,}")
    if not found.difference <= tolerance:  # NaN is not within any tolerance
        raise NotVerified(f"logits of {directory} differ by {found.difference:.3g}; {tolerance:.3g} is allowed")
    return found


def ask_transformers(
    directory: str | Path, inquiry: Inquiry, *, blocks: int | None = None, trust_remote_code: bool = False
) -> Response:
    """Load `directory` in a fresh process as of `verify`, in float32, and ask it.

    The continuation is made with the cache that `generate` of transformers makes.

    Raises:
        NotVerified: it does not load, or its files hold tensors that its class does not use.
    """
    from prunekit.plugins.exporter import Response

    asked = {"ids": inquiry.ids, "tokens": inquiry.tokens, "prompt": inquiry.prompt}
    told, found = _asked(Path(directory), asked, inquiry.new_tokens, blocks=blocks, trust_remote_code=trust_remote_code)
    return Response(**found, parameters=told["parameters"], tensors=told["tensors"])  # type: ignore[arg-type]


def _asked(
    directory: Path,
    asked: Mapping[str, Tensor],
    new_tokens: int = 0,
    *,
    blocks: int | None,
    trust_remote_code: bool,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from prunekit.errors import NotVerified
    from prunekit.export.fresh import Failed, ask_fresh

    trusted = "trusted" if trust_remote_code or _is_ours(directory) else ""
    how = [directory.resolve(), _auto_class(directory), "" if blocks is None else blocks, trusted, new_tokens]
    try:
        return ask_fresh(__file__, asked, how)
    except Failed as error:
        raise NotVerified(f"{directory} does not load in a fresh process:\n{error}") from error


def _auto_class(directory: Path) -> str:
    """Name of the class of transformers that loads a folder; what no config says, the fresh process will."""
    from prunekit.errors import WrongInput
    from prunekit.models.configs import CONFIG, auto_class
    from prunekit.system.files import read_json

    try:
        config = read_json(directory / CONFIG)
    except WrongInput:
        config = {}
    return auto_class(config).__name__


def _is_ours(directory: Path) -> bool:
    """Whether the code that a directory loads with is a copy of our model classes, and there is no other."""
    from prunekit.models import classes

    try:
        named = json.loads((directory / "config.json").read_text(encoding="utf-8"))["auto_map"].values()
        code = (directory / f"{classes.BUNDLED}.py").read_bytes()
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return False
    return (
        all(str(name).startswith(f"{classes.BUNDLED}.") for name in named)
        and code == Path(classes.__file__).read_bytes()
        and len([*directory.rglob("*.py")]) == 1
        and not (directory / "custom_generate").exists()
    )


def answer(
    asked: Mapping[str, Tensor], directory: str, auto: str, blocks: str, trusted: str, new_tokens: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Load and compare, or answer, in the fresh process."""
    import torch

    model, tensors = _loaded(Path(directory), auto, blocks, trusted)
    with torch.no_grad():
        if "logits" in asked:
            expected = asked["logits"].double()
            logits = model(asked["ids"], use_cache=False).logits.double()
            if logits.shape != expected.shape:
                raise SystemExit(f"logits have shape {tuple(logits.shape)}, not {tuple(expected.shape)}")
            difference = float((logits - expected).abs().max())
            return asdict(Verified(_count(model), difference, type(model).__name__)), {}
        logits = model(asked["ids"], use_cache=False).logits.float()
        found = {
            "logprobs": logits.gather(-1, asked["tokens"]) - logits.logsumexp(-1, keepdim=True),
            "likeliest": logits.argmax(-1),
            "continuation": _continued(model, asked["prompt"], int(new_tokens)),
        }
    return {"parameters": _count(model), "tensors": tensors}, found


def _loaded(directory: Path, auto: str, blocks: str, trusted: str) -> tuple[Any, int]:
    """(the model in float32, the number of tensors in its files); all of them are used, and all of it is in them."""
    import torch
    import transformers
    from safetensors import safe_open

    config = json.loads((directory / "config.json").read_text())
    kinds = [config["model_type"], str((config.get("text_config") or {}).get("model_type"))]
    if any(kind.startswith("prunekit_") for kind in kinds) and not trusted:
        importlib.import_module("prunekit")  # as a user would: it registers the model type
    trust: dict[str, Any] = {"trust_remote_code": bool(trusted)}
    if not blocks:
        how: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
        found: Any = getattr(transformers, auto).from_pretrained(directory, **how, **trust)
        model = found[0].eval()
        if strange := sorted({*found[1]["missing_keys"], *found[1]["unexpected_keys"]}):
            raise SystemExit(f"the checkpoint and its model do not agree in {', '.join(strange)}")
    else:
        from prunekit.models.paging import opened

        float32, cpu = torch.float32, torch.device("cpu")
        model, _ = opened(str(directory), lambda _: float32, [cpu], int(blocks), **trust)
    index = directory / "model.safetensors.index.json"
    read = {*json.loads(index.read_text())["weight_map"].values()} if index.exists() else {"model.safetensors"}
    files, tensors = sorted(directory.glob("*.safetensors")), 0
    if strange := [file.name for file in files if file.name not in read]:
        raise SystemExit(f"no part of the model is read from {', '.join(strange)}")
    for file in files:
        with safe_open(file, "pt") as stored:
            tensors += len(stored.keys())
    return model, tensors


def _continued(model: Any, prompt: Tensor, new_tokens: int) -> Tensor:
    """The likeliest tokens one by one, with the cache and through `generate` of transformers."""
    import torch
    from transformers import GenerationConfig

    if not new_tokens:
        return prompt[:0]
    greedy = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    made = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], generation_config=greedy)
    return made[0, len(prompt) :]


def _count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())
