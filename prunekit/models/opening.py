"""Open a model, whole and checked: shapes before weights, so that wrong input fails before long work."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypedDict, TypeVar

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from prunekit.errors import WrongInput
from prunekit.models import checkpoint, paging
from prunekit.models.adapters.find import adapter_for
from prunekit.models.configs import auto_class
from prunekit.models.intake import check_config, check_loaded
from prunekit.models.modules import say_tied, text_config, widen_tables
from prunekit.models.places import at_hand, cannot_open, check_device
from prunekit.models.shards import is_packed, quantized
from prunekit.models.spread import placed, settle
from prunekit.plugins.adapter import ModelAdapter
from prunekit.plugins.dense import Dense
from prunekit.system.memory import SHARES, Shares
from prunekit.system.progress import warn_once
from prunekit.system.rates import times_as_fast

FASTER = 2.0  # times as fast as float32 bfloat16 must be on a CPU: far from what other programs do to a measurement
MEASURED = 2**18  # weights of the largest linear map; of a smaller one there is nothing to gain
WIDEST = 2048  # rows and columns that are measured at most

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

M = TypeVar("M", bound=nn.Module)


def skeleton(source: str | PreTrainedModel, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, ModelAdapter]:
    """The model without its weights, and its adapter.

    Raises:
        WrongInput: no such model, or an architecture without adapter.
    """
    if isinstance(source, PreTrainedModel):
        name = type(source).__name__
        check_config(vars(source.config), name)
        if packed := [key for key, value in source.state_dict().items() if is_packed(key, str(value.dtype))]:
            raise quantized(name, f"{packed[0]} is {source.state_dict()[packed[0]].dtype}")
        model = adapter_for(source.config.model_type).opened(source)
        adapter = adapter_for(model.config.model_type)
        placed(model, adapter)
        return model, adapter
    model = paging.shaped(source, trust_remote_code=trust_remote_code)
    return model, adapter_for(model.config.model_type)


def opened(
    source: str | PreTrainedModel,
    tokenizer: Any = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    shares: Shares = SHARES,
) -> Dense:
    """Load a model from a folder or hub id, or take one in memory (which is copied if it must change).

    Where `shares` bound its blocks, those of a folder or hub id are read when they are needed (`prunekit.paging`);
    nothing else about the model differs. A model in memory whose blocks are on several devices stays there where the
    device is `auto`.

    Args:
        source: a folder, a hub id, or a model in memory.
        tokenizer: of the model; None: the one beside it.
        device: auto, cpu, cuda or cuda:N; several by comma, to which blocks that are read are dealt out.
        dtype: of the computation; auto: that of the checkpoint, on a CPU at least float32. `measured_dtype` may say
            another before.
        trust_remote_code: whether code in the checkpoint may be run.
        shares: of the memory.

    Raises:
        WrongInput: it cannot be opened, has no adapter, or holds weights that are not finite.
    """
    devices = resolved_devices(device)
    place, places = devices[0], devices[:1]
    computed = partial(computing_dtype, dtype=dtype, device=place)
    if isinstance(source, PreTrainedModel):
        if tokenizer is None:
            raise WrongInput("a model in memory needs its tokenizer: prune(model, tokenizer, ...)")
        name = str(getattr(source.config, "_name_or_path", "") or type(source).__name__)
        there = placed(*skeleton(source))
        places = there if device == "auto" and len({*there}) > 1 else places
        model, stored = settle_ties(copy.deepcopy(source)), next(source.parameters()).dtype
    else:
        if shares.blocks is None:
            skeleton(source, trust_remote_code=trust_remote_code)  # wrong input fails before weights are read
        name, tokenizer = source, tokenizer if tokenizer is not None else load_tokenizer(source, trust_remote_code)
        if shares.blocks is None:
            model = loaded(source, trust_remote_code=trust_remote_code)
            stored = next(model.parameters()).dtype
        else:
            model, stored = paging.opened(
                source, computed, devices, shares.blocks, keep=shares.host, trust_remote_code=trust_remote_code
            )
    converted: Mapping[str, int] = {}
    if not isinstance(source, PreTrainedModel):
        with paging.shapes_of(model):
            converted = checkpoint.converted(at_hand(source), model, stored)
    if converted:
        warn_once(converted_as(name, converted, str(stored)[6:]))
    if paging.pager_of(model) is None:
        model = adapter_for(model.config.model_type).opened(model)
    adapter = adapter_for(model.config.model_type)
    if paging.pager_of(model) is None:
        settle(model, adapter, places)
        widen_tables(model)
        stored_as(model, computed(stored)).eval().requires_grad_(False)
    adapter.prepare(model)
    digest = fingerprint(model, name)
    return Dense(model, tokenizer, adapter, stored, name, digest, shares, converted)


def converted_as(name: str, found: Mapping[str, int], dtype: str) -> str:
    """Say that a checkpoint is written in another dtype than parts of it had; `found` is of `checkpoint.converted`."""
    what = " and ".join(f"{count:,} parameters in {other}" for other, count in found.items())
    return f"{name} holds {what}: they are read and written in {dtype}, the dtype of the model"


def computing_dtype(stored: torch.dtype, dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of the computation, for a checkpoint in another and a recipe's `dtype`.

    Raises:
        WrongInput: it would round the weights.
    """
    if dtype == "auto":
        narrow = stored.itemsize < 4 and device.type != "cuda"  # half precision is slow on a CPU
        return torch.float32 if narrow else stored
    if torch.promote_types(stored, DTYPES[dtype]) != DTYPES[dtype]:
        raise WrongInput(f"--dtype {dtype} would round the weights, which are {str(stored)[6:]}; use that or auto")
    return DTYPES[dtype]


def measured_dtype(model: nn.Module, adapter: ModelAdapter, dtype: str, device: torch.device) -> str:
    """What `dtype` says, or where it is auto what this CPU is fast in: bfloat16 or float32, of a bfloat16 checkpoint.

    Some have units for bfloat16, and some that say so are slower with it; so a product of the model's own shape is
    timed. The answer belongs on record: another machine may give another.

    Args:
        model: the model, or its skeleton.
        adapter: of its family.
        dtype: of the recipe.
        device: of the computation.

    Returns:
        A dtype by name; auto stays where nothing is measured.
    """
    if dtype != "auto" or device.type != "cpu" or next(model.parameters()).dtype != torch.bfloat16:
        return dtype
    maps = [module for module in adapter.blocks(model)[0].modules() if isinstance(module, nn.Linear)]
    d_out, d_in = max((tuple(linear.weight.shape) for linear in maps), key=math.prod, default=(0, 0))
    if d_out * d_in < MEASURED:
        return dtype
    return favoured_dtype(d_in, d_out)[0]


def favoured_dtype(d_in: int, d_out: int) -> tuple[str, float]:
    """What this CPU is fast in for a bfloat16 checkpoint, by the clock.

    Args:
        d_in, d_out: shape of the linear map that is timed.

    Returns:
        A dtype by name, and how many times as fast as in float32 the map is in bfloat16.
    """
    ratio = times_as_fast(torch.bfloat16, min(d_in, WIDEST), min(d_out, WIDEST))
    return "bfloat16" if ratio >= FASTER else "float32", ratio


def stored_as(model: M, dtype: torch.dtype) -> M:
    """The model with its parameters in `dtype`, in place; buffers, rotary tables among them, stay exact."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a model.

    Raises:
        WrongInput: there is none.
    """
    path = at_hand(source)
    try:
        found = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        words = len(found.get_vocab().keys() - set(found.all_special_tokens))
    except Exception as error:  # of several parsers, of files of somebody else's
        raise cannot_open(source, error, "has no tokenizer that can be opened") from error
    if not words:  # of some families transformers makes one up
        raise WrongInput(
            f"{source!r} has no tokenizer: there is no vocabulary; put the tokenizer's files beside the model"
        )
    return found


def resolved_devices(devices: str) -> list[torch.device]:
    """Of a run that may use several, by comma; the first holds what is not shared out.

    Raises:
        WrongInput: one of them is not here.
    """
    return [resolved_device(device.strip()) for device in devices.split(",")]


def every_device(devices: str) -> list[torch.device]:
    """Of a run whose model is wider than one device: where none is named by its number, all of the machine's.

    Raises:
        WrongInput: as `resolved_devices`.
    """
    found = resolved_devices(devices)
    if len(found) == 1 and found[0].type == "cuda" and found[0].index is None:
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return found


def resolved_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        WrongInput: no such device here.
    """
    check_device(device)
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = torch.device(device)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count() > 0:
        raise WrongInput(f"no device {device!r}; this machine has {torch.cuda.device_count()} CUDA devices")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise WrongInput(f"device {device!r} was asked, but this machine has no CUDA device; use --device cpu")
    return found


def fingerprint(model: nn.Module, name: str | None = None) -> str:
    """sha256 over the names, shapes and values of all parameters and buffers, of a paged model one at a time.

    Args:
        model: whole or paged.
        name: of a model that is opened, whose values must be finite.

    Raises:
        WrongInput: they are not.
    """
    digest = hashlib.sha256()
    for key, value in paging.tensors(model):
        if name is not None and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise WrongInput(f"{name}: {key} holds values that are not finite; the checkpoint is damaged")
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def loaded(
    source: str, *, dtype: torch.dtype | Literal["auto"] = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model with every weight from its files: transformers would make up what is missing. Of any family.

    Raises:
        WrongInput: it is not there, is not whole, or cannot be read.
    """
    shape = paging.shape_of(source, trust_remote_code=trust_remote_code)  # what cannot be is refused before it is read
    # transformers goes by its config, and by tensors that are tied only if they have one shape
    untied = {} if getattr(shape.config, "tie_word_embeddings", True) else {"tie_word_embeddings": False}
    path = at_hand(source)
    try:
        with without_bars():
            # the dtype goes to the loader: a cast afterwards would round the buffers of the rotary embedding as well
            found: Any = auto_class(shape.config).from_pretrained(
                path,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **untied,
            )
    except Exception as error:  # of several parsers, of files of somebody else's
        raise cannot_open(source, error) from error
    check_loaded(source, path)
    model, report = found
    for name, there, wanted in sorted(report["mismatched_keys"])[:1]:
        raise WrongInput(f"{source!r}: {name} is {tuple(there)}, and its config asks for {tuple(wanted)}")
    checkpoint.check_names(source, report["missing_keys"], checkpoint.unused(path, model) | report["unexpected_keys"])
    return settle_ties(model)


def settle_ties(model: PreTrainedModel) -> PreTrainedModel:
    """Let the config say of head and embedding what their tensors say: shared where they are equal, else two."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Module) or not isinstance(embedding, nn.Module):
        return model
    said = bool(getattr(model.config, "tie_word_embeddings", False))
    if said and head.weight is not embedding.weight and torch.equal(head.weight, embedding.weight):  # type: ignore[arg-type]
        model.tie_weights()
    if said != (shared := head.weight is embedding.weight):
        say_tied(model.config, shared)
    return model


@contextmanager
def without_bars() -> Iterator[None]:
    """Progress is ours to show."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Limits(TypedDict):
    """What tokens must not exceed."""

    max_seqlen: int
    vocab_size: int


def limits(model: Any) -> Limits:
    """What tokens must not exceed."""
    return {
        "max_seqlen": int(getattr(text_config(model.config), "max_position_embeddings", 2048)),
        "vocab_size": int(model.get_input_embeddings().weight.shape[0]),
    }
