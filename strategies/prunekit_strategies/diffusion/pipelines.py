"""A pipeline of diffusers in a folder: what is read of it, what it is conditioned on, and what is written beside it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunekit.errors import NotVerified, WrongInput, first_line
from prunekit.models.opening import computing_dtype
from prunekit.system.files import read_json

if TYPE_CHECKING:
    from prunekit_strategies.diffusion.latents import Conditions, Latents
    from prunekit_strategies.diffusion.unets import Operator

INDEX = "model_index.json"
TEXTS = (".json", ".txt", ".model", ".md")
WEIGHTS = ".safetensors"
LICENSES = ("LICENSE", "NOTICE", "COPYING")
OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".h5")
GUIDANCE = 7.5  # of Stable Diffusion's pipeline
TOKENS = 77  # of conditions drawn at random, as of CLIP
PROMPTS = (
    "a red bicycle leaning against a brick wall",
    "a bowl of oranges on a wooden table, morning light",
    "an old sailor with a grey beard, portrait",
    "a city street at night after rain",
    "two dogs running on a beach",
    "a snow-covered mountain above a lake",
    "a steam locomotive crossing a stone bridge",
    "a watercolour of a garden with sunflowers",
)


@dataclass(frozen=True, eq=False)
class Pipeline:
    """What is read of a pipeline."""

    folder: Path
    index: Mapping[str, Any]  # component -> [library, class]
    unet: Any  # as it is stored
    scheduler: Any
    operators: Sequence[Operator]
    parameters: int  # of the U-Net
    device: torch.device
    dtype: torch.dtype  # of the computation


def open_pipeline(folder: Path, device: torch.device, dtype: str) -> Pipeline:
    """Open the U-Net and the scheduler of a pipeline.

    Args:
        folder: as `save_pretrained` writes it.
        device: of the computation.
        dtype: of it, or auto.

    Raises:
        WrongInput: there is no pipeline, or one that cannot be pruned.
        ImportError: diffusers is not installed.
    """
    if not (folder / INDEX).is_file():
        raise WrongInput(f"{str(folder)!r} holds no {INDEX}; give the folder of a pipeline that diffusers has saved")
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ImportError("pruning a pipeline needs diffusers: pip install 'prunekit[diffusers]'") from error
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from prunekit_strategies.diffusion import unets

    index = read_json(folder / INDEX)
    kinds = {kind.__name__: kind for kind in unets.CLASSES}
    _, name = _named(index, "unet")
    if name not in kinds:
        there = ", ".join(sorted(key for key, value in index.items() if isinstance(value, list) and value[0]))
        raise WrongInput(
            f"the U-Net of {str(folder)!r} is of class {name}, and its parts are {there}; a UNet2DConditionModel or "
            "UNet2DModel can be pruned"
        )
    _check_weights(folder, index)
    if not (files := weight_files(folder / "unet")):
        raise WrongInput(f"{folder / 'unet'} holds no weights in safetensors; save it again with safe_serialization")
    stored = _stored_dtype(files[0])
    _, scheduler_name = _named(index, "scheduler")
    kind = getattr(diffusers, scheduler_name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):  # a file names no other class
        raise WrongInput(
            f"diffusers has no scheduler {scheduler_name!r}, which {INDEX} names; give a pipeline with DDIM"
        )
    try:
        unet: Any = kinds[name].from_pretrained(folder, subfolder="unet", torch_dtype=stored, use_safetensors=True)
        scheduler = kind.from_pretrained(folder, subfolder="scheduler")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise WrongInput(f"the pipeline {str(folder)!r} cannot be opened: {first_line(error)}") from error
    _check_unet(unet)
    if not hasattr(scheduler, "step") or not hasattr(scheduler, "scale_model_input"):
        raise WrongInput(f"{scheduler_name} takes other steps than latents from noise; give a pipeline with DDIM")
    found = unets.operators(unet)
    if not found:
        raise WrongInput(f"the U-Net of {str(folder)!r} has no operator that can be removed")
    return Pipeline(
        folder, index, unet.eval(), scheduler, found, unets.count(unet), device, computing_dtype(stored, dtype, device)
    )


def _named(index: Mapping[str, Any], component: str) -> tuple[str, str]:
    """Library and class of a component."""
    found = index.get(component)
    if not (isinstance(found, list) and len(found) == 2 and all(isinstance(each, str) for each in found)):
        there = ", ".join(sorted(key for key, value in index.items() if isinstance(value, list) and value[0]))
        raise WrongInput(f"the pipeline has no {component}; its parts are {there or 'none'}")
    return found[0], found[1]


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"diffusion_pytorch_model*{WEIGHTS}"))


def _stored_dtype(file: Path) -> torch.dtype:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(next(iter(tensors.keys()))).dtype


def _check_weights(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse components whose weights would not be in the result."""
    for name in index:
        part = folder / name
        files = sorted(part.iterdir()) if not name.startswith("_") and part.is_dir() else []
        others = [file for file in files if file.suffix in OTHER_WEIGHTS]
        if others and not any(file.suffix == WEIGHTS for file in files):
            raise WrongInput(
                f"{others[0]} is no safetensors file, and only such weights are read and copied; save the pipeline "
                "again with safe_serialization"
            )


def _check_unet(unet: Any) -> None:
    """Refuse a U-Net that is given more than latents, a time and conditions."""
    config = unet.config
    unmet = {
        "class_embed_type": config.get("class_embed_type"),
        "num_class_embeds": config.get("num_class_embeds"),
        "addition_embed_type": config.get("addition_embed_type"),
        "encoder_hid_dim_type": config.get("encoder_hid_dim_type"),
        "attention_type": None if config.get("attention_type") in (None, "default") else config["attention_type"],
    }
    for key, value in unmet.items():
        if value is not None:
            raise WrongInput(
                f"the U-Net has {key} {value!r}, an input that calibration does not make; U-Nets of latents, time and "
                "text conditions can be pruned, such as those of Stable Diffusion 1 and 2"
            )
    if config["in_channels"] != config["out_channels"]:
        raise WrongInput(
            f"the U-Net makes {config['out_channels']} channels from {config['in_channels']}; one that makes as many "
            "as it is given can be pruned"
        )


def make_conditions(
    pipeline: Pipeline, samples: int, guidance: float | None, prompts: Sequence[str] | None, seed: int
) -> Conditions:
    """Text as the pipeline's own encoder reads it, or random conditions of the same shape.

    Raises:
        WrongInput: prompts or guidance without what they need.
    """
    from prunekit_strategies.diffusion.latents import Conditions

    width = pipeline.unet.config.get("cross_attention_dim") if _is_conditional(pipeline.unet) else None
    encoder = pipeline.index.get("text_encoder")
    reads = width is not None and isinstance(encoder, list) and encoder[0] == "transformers"
    if not reads and prompts is not None:
        raise WrongInput("prompts were given, and the pipeline has no text encoder of transformers for them")
    if not reads and guidance not in (None, 1, 1.0):
        raise WrongInput(f"guidance {guidance} was asked, which needs a text encoder; give 1, or leave it out")
    if prompts is not None and not prompts:
        raise WrongInput("prompts is an empty list; give some, or leave it out")
    if width is None:
        return Conditions(None, None)
    if not isinstance(width, int):
        raise WrongInput(f"the U-Net has conditions of several widths, {width}; one of a single width can be pruned")
    if not reads:
        draw = torch.Generator().manual_seed(seed)
        return Conditions(torch.randn(samples, TOKENS, width, generator=draw), None)
    strength = GUIDANCE if guidance is None else float(guidance)
    texts = list(prompts or PROMPTS)
    used = [texts[i % len(texts)] for i in range(samples)]
    encoded = _encode(pipeline.folder, _named(pipeline.index, "text_encoder")[1], ["", *dict.fromkeys(used)])
    if encoded.shape[-1] != width:
        raise WrongInput(f"the text encoder makes {encoded.shape[-1]} values a token, and the U-Net reads {width}")
    rows = dict(zip(["", *dict.fromkeys(used)], encoded, strict=True))
    wanted = torch.stack([rows[text] for text in used])
    return Conditions(wanted, encoded[:1] if strength != 1 else None, strength)


def _is_conditional(unet: Any) -> bool:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return isinstance(unet, UNet2DConditionModel)


@torch.no_grad()
def _encode(folder: Path, kind: str, texts: Sequence[str]) -> Tensor:
    """The last hidden states of every text, padded to the encoder's length: (texts, length, d)."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
        encoder = getattr(transformers, kind).from_pretrained(
            folder / "text_encoder", dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError, AttributeError) as error:
        raise WrongInput(f"the text encoder of {str(folder)!r} cannot be opened: {first_line(error)}") from error
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    ids = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoder.eval()(ids.input_ids)[0]


def copy_rest(source: Path, result: Path) -> list[str]:
    """Copy a pipeline but its U-Net: weights in safetensors, configs and texts. Code and other formats stay behind.

    Returns:
        What was not copied, by path.
    """
    left = []
    index = read_json(source / INDEX)
    parts = {name for name in index if not name.startswith("_")} - {"unet"}
    for file in sorted(source.rglob("*")):
        path = file.relative_to(source)
        if not file.is_file() or path.parts[0] == "unet" or path == Path(INDEX) or path.parts[0].startswith("."):
            continue
        top = len(path.parts) == 1 and (file.suffix == ".md" or file.stem.upper() in LICENSES)
        if top or (path.parts[0] in parts and file.suffix in (*TEXTS, WEIGHTS)):
            (result / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, result / path)
        else:
            left.append(path.as_posix())
    return left


def verify_written(result: Path, small: Any, net: Latents) -> None:
    """Load what was written in a fresh process, and compare it on one step.

    Raises:
        NotVerified: says what differs.
    """
    from prunekit.export.fresh import Failed, ask_fresh
    from prunekit_strategies.diffusion import fresh, unets

    stored = next(small.parameters()).dtype
    exact = stored if stored.itemsize >= 4 else torch.float32  # half precision is not for every CPU
    twin = type(small).from_config(small.config)
    twin.load_state_dict(small.state_dict())
    nn.Module.to(twin.eval(), device="cpu", dtype=exact)
    asked = {"latents": net.noise[:2].to("cpu", exact), "time": torch.tensor(1)}
    if net.conditions.wanted is not None:
        asked["conditions"] = net.conditions.wanted[:2].to("cpu", exact)
    with torch.no_grad():
        mine = twin(asked["latents"], asked["time"], *([asked["conditions"]] if "conditions" in asked else []))[0]
    try:
        told, found = ask_fresh(fresh.__file__, asked, [result.resolve()])
    except Failed as error:
        raise NotVerified(f"the U-Net that was written does not load: {first_line(error)}") from error
    if told["parameters"] != unets.count(small):
        raise NotVerified(
            f"the U-Net has {told['parameters']:,} parameters when it is loaded, not {unets.count(small):,}"
        )
    distance = float((found["predicted"] - mine).norm() / mine.norm().clamp_min(1e-30))
    if not distance <= 1e-5:
        raise NotVerified(f"the U-Net predicts otherwise when it is loaded, by {distance:.2g} of the norm")
