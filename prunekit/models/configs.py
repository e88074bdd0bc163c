"""The config of a model, from a folder that others have made, and the shapes it asks for: checked before any work.

Classes of transformers fail on a wrong value in many ways, and some only after minutes; here it is one sentence that
names file and key.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from prunekit.errors import WrongInput, one_line
from prunekit.models.places import cannot_open
from prunekit.system.files import read_json

CONFIG = "config.json"
MOST = {  # of what a model has; nothing near it exists, and what is beyond works for minutes before it fails
    "layers": 1024,
    "num_hidden_layers": 1024,
    "n_layer": 1024,
    "vocab_size": 1 << 26,
    "max_position_embeddings": 1 << 32,
    "num_labels": 1 << 12,
}
MOST_OTHERS = 1 << 22
COUNTED = re.compile(r"(num|n)_.+|.*_?(size|dim|rank|heads|layers|layer|embeddings|kernel)")
LEAST = {"hidden_size", "intermediate_size", "ffn_dim", "vocab_size", "num_hidden_layers", "num_attention_heads"}
LEAST |= {"num_key_value_heads", "max_position_embeddings"}
FROM_THE_END = {"vision_feature_layer"}  # places that may be counted so
POSITIVE = {"rope_theta", "factor"}
OUTPUTS = {  # what a run reads of a model
    "return_dict": (True,),
    "output_attentions": (False, None),
    "output_hidden_states": (False, True, None),
}
POINTER = 1024  # bytes; a smaller file holds no weights but says where they are
BITS = 8  # parameters in a byte, at most


def parse_config(source: str, path: str, *, trust_remote_code: bool = False) -> Any:
    """Read the config of a model.

    Args:
        source: what the user calls it.
        path: a folder or a hub id.
        trust_remote_code: whether code in the folder may be run.

    Raises:
        WrongInput: it cannot be read, or holds what no model has.
    """
    file = Path(path) / CONFIG
    values = read_json(file) if os.path.lexists(file) else {}
    for key, value in _numbers(values):
        _check(file, key, value)
    for key, known in OUTPUTS.items():
        if not any(values.get(key, known[0]) is each for each in known):
            raise WrongInput(f"{file}: {key} is {values[key]!r}, and models are run with {known[0]}; remove that key")

    def read(values: dict[str, Any]) -> Any:
        return CONFIG_MAPPING[values["model_type"]].from_dict(values)

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a class of a model family makes of the values
        raise _unusable(source, error, values, read) from error


def auto_class(config: Any) -> Any:
    """The class of transformers that opens a model: of text, or of images and text.

    Args:
        config: of the model, or what the file of it holds, whoever made it.
    """
    kind: Any = None
    if isinstance(config, Mapping):
        name, own = config.get("model_type"), config.get("auto_map")
        if isinstance(name, str) and name in CONFIG_MAPPING:
            kind = CONFIG_MAPPING[name]
    else:
        kind, own = type(config), getattr(config, "auto_map", None)
    own = own if isinstance(own, Mapping) else {}
    takes_images = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or AutoModelForImageTextToText.__name__ in own
    of_text = kind in MODEL_FOR_CAUSAL_LM_MAPPING or AutoModelForCausalLM.__name__ in own
    return AutoModelForImageTextToText if takes_images and not of_text else AutoModelForCausalLM


def make_shape(config: Any, source: str, path: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Make the model of a config without its weights, on the meta device.

    Raises:
        WrongInput: no model can have these values, or it is far larger than the weights beside them.
    """

    def build(config: Any) -> PreTrainedModel:
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)

    file = Path(path) / CONFIG
    try:
        model = build(config)
    except Exception as error:  # as above
        values = read_json(file) if file.is_file() else {}
        raise _unusable(source, error, values, lambda values: build(AutoConfig.for_model(**values))) from error
    wanted, there = sum(p.numel() for p in model.parameters()), _bytes_of_weights(file.parent)
    if there and wanted > BITS * there:
        raise WrongInput(f"{file} asks for {wanted:,} parameters, and the weights beside it have {there:,} bytes")
    return model


def _numbers(values: Any, path: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers, by dotted key."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _numbers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, (int, float)) and not isinstance(values, bool):
        yield path, values


def _check(file: Path, key: str, value: float) -> None:
    name = key.rpartition(".")[2]
    most = MOST.get(name, MOST_OTHERS)
    if not math.isfinite(value):
        raise WrongInput(f"{file}: {key} is {value}, which is no finite number")
    if name in POSITIVE and value <= 0:
        raise WrongInput(f"{file}: {key} is {value}, and must be more than 0")
    if COUNTED.fullmatch(name) is None or (name in FROM_THE_END and value < 0):
        return
    if value < (name in LEAST):
        raise WrongInput(f"{file}: {key} is {value}, and no model has so few")
    if value > most:
        raise WrongInput(f"{file}: {key} is {value:,}, and more than {most:,} are not supported")


def _unusable(
    source: str, error: Exception, values: dict[str, Any], attempt: Callable[[dict[str, Any]], Any]
) -> WrongInput:
    """A sentence for what a class of transformers says of a config, with the key that is to blame if one is."""
    if isinstance(error, OSError) or "trust_remote_code" in str(error):
        return cannot_open(source, error)
    said = one_line(error)
    kind = "" if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: "
    named = (key for key in values if re.search(rf"[`']{re.escape(key)}[`']", said))
    key = next(named, None) or _blamed(values, attempt)
    where = "" if key is None else f"{CONFIG} has {key}: {repr(values[key])[:60]}: "
    return WrongInput(f"{source!r} is not a model that can be opened: {where}{kind}{said[:300]}")


def _blamed(values: dict[str, Any], attempt: Callable[[dict[str, Any]], Any]) -> str | None:
    """The first key without which there is a model: a default takes its place. None: it is not one alone."""
    if not isinstance(values.get("model_type"), str) or values["model_type"] not in CONFIG_MAPPING:
        return "model_type" if "model_type" in values and "auto_map" not in values else None

    def works(values: dict[str, Any]) -> bool:
        try:
            attempt(values)
        except Exception:
            return False
        return True

    small = values | {"num_hidden_layers": 1} if values.get("layer_types") is None else values
    if works(small):
        return None
    keys = (key for key in values if key != "model_type")
    return next((key for key in keys if works({k: v for k, v in small.items() if k != key})), None)


def _bytes_of_weights(folder: Path) -> int:
    """Bytes of the files with weights in a folder; 0: they are elsewhere."""
    sizes = [file.stat().st_size for kind in ("safetensors", "bin") for file in folder.glob(f"*.{kind}")]
    return sum(sizes) if min(sizes, default=0) >= POINTER else 0
