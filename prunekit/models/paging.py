"""Models larger than memory: blocks are read when a parameter of theirs is asked for, and freed for others.

A paged model is an ordinary one whose blocks, and head, hold placeholders on the meta device. Whoever asks a module
for a parameter (`linear.weight`, a forward pass) gets the real one, and with it the whole part it belongs to. Shapes
need no reading, copies share what is read, and what somebody still holds when its part is freed stays as it is.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from prunekit.errors import WrongInput
from prunekit.models.adapters.find import adapter_for
from prunekit.models.checkpoint import Checkpoint, tied_otherwise
from prunekit.models.configs import make_shape
from prunekit.models.intake import read_config
from prunekit.models.modules import make_tables, say_tied
from prunekit.models.places import at_hand
from prunekit.models.shards import Shards
from prunekit.models.spread import dealt_out, moved, place_of, spread
from prunekit.plugins.adapter import ModelAdapter

UNMADE = torch.iinfo(torch.int64).min  # a whole number that no table holds

Read = Callable[[str, torch.device], Tensor]
"""A parameter by its name in the model, on a device, in the dtype of the computation."""


class Page:
    """A part of a model: its parameters are read together, to one device, and freed together."""

    def __init__(
        self, pager: Pager, bytes_: int, read: Callable[[], Mapping[str, Tensor]], device: torch.device
    ) -> None:
        self.pager, self.bytes, self.read, self.device = pager, bytes_, read, device
        pager.pages.append(self)


class Pager:
    """Holds the pages that were used last, up to a bound in bytes on every device, at least one.

    While one is used the next is read: the one that came after it the last time, or that comes after it in the model.
    It is only read ahead where it fits beside the two that were used last.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.reads = 0  # pages that were asked for and not there
        self.shut = False  # placeholders are given, not what they stand for
        self.pages: list[Page] = []
        self._held: OrderedDict[Page, dict[str, nn.Parameter]] = OrderedDict()
        self._ahead: tuple[Page, Future[Mapping[str, Tensor]]] | None = None
        self._after: dict[Page, Page] = {}
        self._last: Page | None = None
        self._thread = ThreadPoolExecutor(1, "prunekit-pager")  # starts when it is needed

    def __deepcopy__(self, _: Any) -> Pager:
        return self

    @property
    def held(self) -> int:
        """Bytes in memory, or on their way."""
        return sum(page.bytes for page in self._there)

    def parameter(self, page: Page, name: str) -> nn.Parameter:
        """The real parameter of that name in a page."""
        if page not in self._held:
            self._held[page] = {n: nn.Parameter(t, requires_grad=False) for n, t in self._read(page).items()}
            self._held.move_to_end(page)
            self._read_ahead(page)
        self._held.move_to_end(page)
        return self._held[page][name]

    def clear(self) -> None:
        """Free all pages."""
        self._held.clear()
        self._forget()

    @property
    def _there(self) -> list[Page]:
        return [*self._held, *([self._ahead[0]] if self._ahead is not None else [])]

    def _make_room(self, page: Page, *, but: int) -> bool:
        """Free pages on the device of this one, not the last `but` that were used; whether it fits then."""

        def fits() -> bool:
            return sum(each.bytes for each in (page, *self._there) if each.device == page.device) <= self.bound

        for old in [*self._held][: len(self._held) - but]:
            if fits():
                break
            if old.device == page.device:
                del self._held[old]
        return fits()

    def _read(self, page: Page) -> Mapping[str, Tensor]:
        self.reads += 1
        if self._last is not None:
            self._after[self._last] = page
        self._last = page
        if self._ahead is not None and self._ahead[0] is page:
            (_, found), self._ahead = self._ahead, None
            return found.result()
        self._forget()
        self._make_room(page, but=0)
        return page.read()

    def _read_ahead(self, page: Page) -> None:
        after = self._after.get(page) or self.pages[(self.pages.index(page) + 1) % len(self.pages)]
        if after in self._held:
            return
        if self._make_room(after, but=2):
            self._ahead = after, self._thread.submit(_aside, after.read, after.device)

    def _forget(self) -> None:
        """What was read ahead and not asked for."""
        if self._ahead is not None:
            self._ahead[1].exception()  # it takes memory until it is done
            self._ahead = None


def _aside(read: Callable[[], Mapping[str, Tensor]], device: torch.device) -> Mapping[str, Tensor]:
    """What is read, there when this returns; on a GPU its copies do not wait for the work that is under way."""
    if device.type != "cuda":
        return read()
    stream, work = torch.cuda.Stream(device), torch.cuda.default_stream(device)
    with torch.cuda.stream(stream):
        found = read()
    stream.synchronize()
    for tensor in found.values():
        tensor.record_stream(work)
    return found


class Placeholder(nn.Parameter):
    """Stands for a parameter that is not in memory; has its shape and dtype."""

    page: Page
    name_there: str

    @classmethod
    def of(cls, parameter: Tensor, dtype: torch.dtype, page: Page, name: str) -> Placeholder:
        """In the place of a parameter of the model, called `name` in its page."""
        self = cls(torch.empty(parameter.shape, dtype=dtype, device="meta"), requires_grad=False)
        self.page, self.name_there = page, name
        return self

    def __deepcopy__(self, _: Any) -> Placeholder:
        return self  # what it stands for is only read


class Paged(nn.Module):
    """Mixed in before the class of a module that owns placeholders."""

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return real(found) if isinstance(found, Placeholder) and not found.page.pager.shut else found


@cache
def _paged(cls: type[nn.Module]) -> type[nn.Module]:
    # transformers goes by the names of classes
    return type(cls.__name__, (Paged, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def pager_of(model: nn.Module) -> Pager | None:
    """The pager of a paged model, None of others."""
    return vars(model).get("pager")


def rest(model: nn.Module) -> None:
    """Free what a paged model holds: pages know their pager, so that nobody does when the model is gone."""
    if (pager := pager_of(model)) is not None:
        pager.clear()


@contextmanager
def shapes_of(model: nn.Module) -> Iterator[None]:
    """Within: parameters of a paged model are placeholders, so that asking for shapes reads nothing."""
    if (pager := pager_of(model)) is None:
        yield
        return
    was, pager.shut = pager.shut, True
    try:
        yield
    finally:
        pager.shut = was


def attach(
    model: PreTrainedModel,
    adapter: ModelAdapter,
    read: Read,
    dtype: torch.dtype,
    bound: int,
    devices: Sequence[torch.device],
) -> None:
    """Let a model on the meta device read its blocks, and its head, through `read`; what is left is read now.

    Args:
        model: changed in place.
        adapter: of its family.
        read: asked for the parameters of one part, then for those of the next.
        dtype: of all parameters.
        bound: bytes of parts that are held at once on every device.
        devices: that the blocks are dealt out to; everything else is on the first.
    """
    model.pager = pager = Pager(bound)  # type: ignore[assignment]
    home, blocks = devices[0], adapter.blocks(model)
    places = dealt_out([sum(p.numel() for p in block.parameters()) for block in blocks], devices)
    parts: list[tuple[str, nn.Module, torch.device]] = [
        (f"{adapter.layers}.{index}", block, place)
        for index, (block, place) in enumerate(zip(blocks, places, strict=True))
    ]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, nn.Module) and head.weight is not embedding.weight:
        parts += [(name, module, home) for name, module in model.named_modules() if module is head]
    for prefix, part, place in parts:
        names = [f"{prefix}.{name}" for name, _ in part.named_parameters()]
        size = sum(p.numel() for p in part.parameters()) * dtype.itemsize
        page = Page(pager, size, partial(_all, read, names, place), place)
        for path, module in part.named_modules():
            own = list(module.named_parameters(recurse=False))
            for name, parameter in own:
                full = ".".join(filter(None, (prefix, path, name)))
                setattr(module, name, Placeholder.of(parameter, dtype, page, full))
            if own:
                module.__class__ = _paged(type(module))
    with shapes_of(model):
        found: dict[int, nn.Parameter] = {}  # by the one it stands in for: tied ones stay tied
        for path, module in model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if isinstance(parameter, Placeholder):
                    continue
                if id(parameter) not in found:
                    value = read(f"{path}.{name}" if path else name, home)
                    found[id(parameter)] = nn.Parameter(value, requires_grad=False)
                setattr(module, name, found[id(parameter)])
    spread(model, adapter, places)


def _all(read: Read, names: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    return {name: read(name, device) for name in names}


def whole(model: PreTrainedModel, dense: nn.Module | None = None) -> PreTrainedModel:
    """A model with tensors of its own, all in memory: copied are those it shares with the dense one; None: all."""
    dense = model if dense is None else dense
    with shapes_of(model):
        shared = {id(tensor) for tensor in (*dense.parameters(), *dense.buffers())}
        memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in shared}
        own = copy.deepcopy(model, memo)
    if pager_of(model) is None:
        return own
    for module in own.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, Placeholder):
                setattr(module, name, nn.Parameter(getattr(module, name).detach().clone(), requires_grad=False))
        if isinstance(module, Paged):
            module.__class__ = type(module).__bases__[1]
    del own.pager
    return own


def shaped(source: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """As `shape_of`, of a family that prunekit has an adapter for, as that opens it.

    Raises:
        WrongInput: it cannot be opened, or there is no adapter.
    """
    adapter = adapter_for(read_config(source, trust_remote_code=trust_remote_code).model_type)
    return adapter.opened(shape_of(source, trust_remote_code=trust_remote_code))


def shape_of(source: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without its weights, tied as the tensors in its files are, whatever its config says. Of any family.

    Raises:
        WrongInput: it cannot be opened.
    """
    config, path = read_config(source, trust_remote_code=trust_remote_code), at_hand(source)
    model = make_shape(config, source, path, trust_remote_code=trust_remote_code)
    if getattr(config, "tie_word_embeddings", False) and tied_otherwise(path, model):
        say_tied(config, False)
        model = make_shape(config, source, path, trust_remote_code=trust_remote_code)
    return model


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The state of a model in the order of names, one tensor at a time where it is paged."""
    with shapes_of(model):
        state = model.state_dict(keep_vars=True)
    for name, value in sorted(state.items()):
        yield name, real(value).detach()


def real(parameter: Tensor) -> Tensor:
    """What a placeholder stands for; anything else is itself."""
    if isinstance(parameter, Placeholder):
        return parameter.page.pager.parameter(parameter.page, parameter.name_there)
    return parameter


def opened(
    path: str,
    computed: Callable[[torch.dtype], torch.dtype],
    devices: Sequence[torch.device],
    bound: int,
    *,
    keep: int = 0,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, torch.dtype]:
    """Open a model whose blocks are read when they are needed.

    Args:
        path: a folder or a hub id.
        computed: makes of the dtype of the checkpoint that of the computation.
        devices: of the computation: blocks are dealt out to them, everything else is on the first.
        bound: bytes of blocks that are held at once on every device.
        keep: bytes of blocks that are kept in the host's memory, so that they are not read from disk again.
        trust_remote_code: whether code in the checkpoint may be run.

    Returns:
        (the model, the dtype of its checkpoint).

    Raises:
        WrongInput: it is not whole, or cannot be read block by block.
    """
    model, source, path = shaped(path, trust_remote_code=trust_remote_code), path, at_hand(path)
    if (stored := read_config(source, trust_remote_code=trust_remote_code).model_type) != model.config.model_type:
        raise WrongInput(
            f"{source!r} is of type {stored} and opened as {model.config.model_type}, which needs it whole; give "
            "--memory for all of it"
        )
    if not Path(path).is_dir():
        Shards.of(path, source)  # fetched, so that the tensors can say what is tied
        model = shaped(source, trust_remote_code=trust_remote_code)
    with suppress(OSError):  # it has none: that of the class stays
        model.generation_config = GenerationConfig.from_pretrained(path)
    model.config.name_or_path = path
    checkpoint, home = Checkpoint(source, path, model), devices[0]
    dtype = computed(checkpoint.dtype)
    read = partial(checkpoint.read, dtype=dtype)
    attach(model, adapter_for(model.config.model_type), read, dtype, bound, devices)
    fill_buffers(model, checkpoint, home)
    for block in adapter_for(model.config.model_type).blocks(model):
        for module in block.modules():
            module._buffers = moved(module._buffers, place_of(block, home))
    checkpoint.room = keep  # what was read until now will not be asked for again
    return model.eval().requires_grad_(False), checkpoint.dtype


def fill_buffers(model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device) -> None:
    """Buffers on the meta device: from the checkpoint, or made as the model, or the one inside it, makes them.

    Raises:
        WrongInput: a table is neither.
    """
    makers: dict[str, PreTrainedModel] = {"": model}
    for path, module in model.named_modules():
        maker = module if isinstance(module, PreTrainedModel) else makers[path.rpartition(".")[0]]
        made, makers[path] = [], maker
        for name, buffer in list(module.named_buffers(recurse=False)):
            full = f"{path}.{name}" if path else name
            if not buffer.is_meta:
                continue
            if (origin := checkpoint.origins.get(full)) is not None:
                setattr(module, name, nn.Buffer(origin.made(checkpoint.shards.read).to(device)))
                continue
            made.append(full)
            if buffer.is_floating_point():
                exact = torch.promote_types(buffer.dtype, torch.float32)  # whatever the weights are rounded to
                unmade = torch.full(buffer.shape, torch.nan, dtype=exact, device=device)
                setattr(module, name, nn.Buffer(unmade, persistent=False))
            elif buffer.dtype == torch.int64:  # such as positions
                unmade = torch.full(buffer.shape, UNMADE, dtype=buffer.dtype, device=device)
                setattr(module, name, nn.Buffer(unmade, persistent=False))
        if made:
            make_tables(maker, module)
        for full in made:
            if (buffer := model.get_buffer(full)).is_meta or not bool(
                (torch.isfinite(buffer) & (buffer != UNMADE)).all()
            ):
                raise WrongInput(f"{full} is in no file and cannot be made by itself; open the model whole")
