"""Checkpoints on disk by the names of their model: transformers has renamed some tensors, and merged others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from prunekit.errors import WrongInput, first_line
from prunekit.models.places import here
from prunekit.models.shards import INDEX, WEIGHTS, Shards
from prunekit.system.progress import warn_once

MOST_NAMES = 50  # in a sentence


@dataclass(frozen=True)
class Origin:
    """Where a parameter of a model comes from: one tensor of its files, or several that are merged.

    Matrices of experts are merged: files have one for every expert, and the model one tensor of all of them.
    """

    name: str  # of the parameter
    parts: tuple[tuple[str, str], ...]  # (pattern of the converter, name in the files), in the order of the merge
    converter: WeightConverter | None = None  # None: the one tensor as it is

    @property
    def names(self) -> tuple[str, ...]:
        """In the files."""
        return tuple(name for _, name in self.parts)

    def made(self, read: Callable[[str], Tensor]) -> Tensor:
        """The parameter, of tensors that `read` gives by their names in the files.

        Raises:
            ValueError: they do not fit together.
        """
        if self.converter is None:
            return read(self.names[0])
        converter: Any = copy.deepcopy(self.converter)  # it collects what it is given
        for pattern, name in self.parts:
            converter.add_tensor(self.name, name, pattern, partial(read, name))
        try:
            return converter.convert(self.name)[self.name]
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"its {len(self.parts)} parts do not fit together: {first_line(error)}") from error


class Checkpoint:
    """A checkpoint on disk and the model it is of: parameters by the model's names.

    What is read is kept in the host's memory for the next time, as long as there are bytes of `room`.
    """

    def __init__(self, source: str, path: str, model: PreTrainedModel) -> None:
        """Raises WrongInput where it is not whole, or of other shapes than the model."""
        self.room, self._kept = 0, dict[str, Tensor]()
        self.shards = Shards.of(path, source)
        there, state = self.shards.tensors, model.state_dict()
        dtype = getattr(model.config, "dtype", None)
        # where a config says none, transformers takes that of the first parameter
        there_first = next((t.dtype for t in there.values() if t.dtype.is_floating_point), torch.float32)
        self.dtype = dtype if isinstance(dtype, torch.dtype) else there_first
        self.origins = origins(list(there), model, state)
        tied = getattr(model, "all_tied_weights_keys", {})
        self.origins |= {b: self.origins[a] for a, b in tied.items() if a in self.origins and b not in self.origins}
        missing = state.keys() - self.origins.keys() - set(tied)
        used = {name for origin in self.origins.values() for name in origin.names}
        check_names(source, missing, there.keys() - used)
        for name, origin in self.origins.items():
            self._check_shape(source, name, origin, tuple(state[name].shape))

    def _check_shape(self, source: str, name: str, origin: Origin, wanted: tuple[int, ...]) -> None:
        """On the meta device: nothing is read."""
        try:
            found = origin.made(lambda part: torch.empty(self.shards.tensors[part].shape, device="meta"))
        except ValueError as error:
            raise WrongInput(f"{source!r}: {name} cannot be read, {error}; fetch the model again") from error
        if tuple(found.shape) != wanted:
            raise WrongInput(f"{source!r}: {name} is {tuple(found.shape)}, and its config asks for {wanted}")

    def read(self, name: str, device: torch.device, *, dtype: torch.dtype) -> Tensor:
        """A parameter in another dtype, rounded to the checkpoint's before, as a model opened whole is."""
        if (value := self._kept.get(name)) is None:
            value = self.origins[name].made(self.shards.read).to(self.dtype)
            if value.nbytes <= self.room:
                self.room -= value.nbytes
                # from pinned memory a copy takes the whole width of the bus
                self._kept[name] = value = value.pin_memory() if device.type == "cuda" else value
        return value.to(device).to(dtype)  # as it is stored, which is less to carry


def origins(stored: Sequence[str], model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Origin]:
    """By the model's names, of tensors with these names in the files, which may be without its head.

    Raises:
        WrongInput: a parameter is there twice.
    """
    found = dict[str, Origin]()
    for name, ours, pattern, converter in _renamed(stored, model, state):
        if converter is None and ours in found:
            twice = f"{found[ours].names[0]} and as {name}"
            raise WrongInput(f"the checkpoint holds {ours} twice, as {twice}; remove one")
        parts = found[ours].parts if ours in found else ()
        found[ours] = Origin(ours, (*parts, (pattern, name)), converter)
    return found


def _renamed(
    stored: Sequence[str], model: PreTrainedModel, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, str, WeightConverter | None]]:
    """(a name in the files, the model's name, how it is matched, what merges it with others) of what the model has."""
    transforms, own = get_model_conversion_mapping(model), dict(state)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    for name in sorted(stored, key=dot_natural_key):  # expert 2 before expert 10, as transformers merges them
        ours, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if ours in state:
            yield name, ours, pattern or name, None if pattern is None else by_pattern[pattern]


def check_names(source: str, missing: Iterable[str], unused: Iterable[str]) -> None:
    """Refuse a checkpoint that lacks parameters of its model, and name what the model has no place for.

    Raises:
        WrongInput: it lacks some.
    """
    lost = listed(unused)
    if missing := sorted(missing):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        other = f", and holds {lost}, for which its model has no place" if lost else ""
        raise WrongInput(f"the checkpoint of {source!r} lacks {missing[0]}{more}{other}; it is not whole")
    if lost:
        warn_once(f"the checkpoint of {source!r} holds {lost}, for which its model has no place: they are left out")


def listed(names: Iterable[str]) -> str:
    """Names in a sentence, the first of very many."""
    every = sorted(names)
    rest = len(every) - MOST_NAMES
    return ", ".join(every[:MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def tied_otherwise(path: str, model: PreTrainedModel) -> bool:
    """Whether the files hold a tensor that the config says is shared with another, and it differs from that."""
    folder, tied = here(path), getattr(model, "all_tied_weights_keys", {})
    if not tied or not ((folder / WEIGHTS).exists() or (folder / INDEX).exists()):
        return False
    shards = Shards.of(str(folder))
    found = origins(list(shards.tensors), model, model.state_dict())
    both = [(found[a], found[b]) for a, b in tied.items() if {a, b} <= found.keys()]
    pairs = [(one.made(shards.read), other.made(shards.read)) for one, other in both]
    return any(one.shape != other.shape or not torch.equal(one.to(other.dtype), other) for one, other in pairs)


def unused(path: str, model: PreTrainedModel) -> set[str]:
    """Tensors in the files of a folder that no parameter or buffer of the model is read from."""
    folder = here(path)
    if not ((folder / WEIGHTS).exists() or (folder / INDEX).exists()):
        return set()
    names = Shards.of(str(folder)).tensors.keys()
    found = origins(list(names), model, model.state_dict())
    return names - {name for origin in found.values() for name in origin.names}


def converted(path: str, model: PreTrainedModel, dtype: torch.dtype) -> dict[str, int]:
    """Count the tensors that the files of a folder hold in another dtype than `dtype`, by that other.

    Of a model that is read block by block within `paging.shapes_of`, or all of it is read.
    """
    folder = here(path)
    if not ((folder / WEIGHTS).exists() or (folder / INDEX).exists()):
        return {}
    state, own = model.state_dict(), {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stored = Shards.of(str(folder)).tensors
    sources = [(name, there) for name, origin in origins(list(stored), model, state).items() for there in origin.names]
    found = [str(stored[there].dtype)[6:] for name, there in sources if name in own]
    return {name: found.count(name) for name in sorted({*found} - {str(dtype)[6:]})}
