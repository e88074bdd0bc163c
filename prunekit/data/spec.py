"""Which text, and how much of it: the data section of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from prunekit.errors import WrongInput
from prunekit.system.strict import Strict

Fields = Annotated[str, BeforeValidator(lambda value: ",".join(value) if _are_names(value) else value)]
"""A field of rows, or several: a list of names, or names with commas between them."""


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(name, str) for name in value)


WindowStart = Literal["auto", "none", "bos"]
"""What a window of text begins with: as the tokenizer begins a text, as the text does where it is cut, or with BOS."""


class TextSpec(Strict):
    """One of several data sets."""

    dataset: str
    config: str | None = None
    split: str | None = None
    field: Fields | None = None  # None: that of `data`
    weight: Annotated[float, Field(gt=0)] = 1.0  # of its share of the windows


def as_texts(value: Any) -> Any:
    """A list of data sets in one form, {dataset: ...}; of a list of one name the name."""
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) == 1 and isinstance(value[0], str):
        return value[0]
    return tuple({"dataset": text} if isinstance(text, str) else text for text in value)


TAGS = ("one data set", "several data sets")  # of the two forms, in pydantic's errors
Texts = Annotated[
    Annotated[str, Tag(TAGS[0])] | Annotated[tuple[TextSpec, ...], Field(min_length=1), Tag(TAGS[1])],
    Discriminator(lambda value: TAGS[isinstance(value, tuple)]),
    BeforeValidator(as_texts),
]
"""A data set by name, or several: a list of names and {dataset: ..., weight: ..., split: ...}."""


def names_of(texts: str | tuple[TextSpec, ...] | None) -> list[str]:
    """The names of some data sets."""
    return [texts] if isinstance(texts, str) else [text.dataset for text in texts or ()]


class DataSpec(Strict):
    """Which text, and how much of it; amounts in tokens. None: chosen when the text is read."""

    dataset: Texts = "auto"  # python-docs, a file, general, a name on the hub; auto: fineweb-edu where the hub answers
    config: str | None = None
    split: str | None = None
    field: Fields | None = None  # of rows: a, a.b or a,b; None: text, a conversation or questions, as there is
    special_tokens: bool = False  # whether text that spells a special token, as <|endoftext|>, becomes one
    search_dataset: Texts | None = None  # None: further on in `dataset`; text, or questions with their answers
    recovery_dataset: Texts | None = None  # what finishers that train learn from; None: further on in `dataset`
    evaluation_dataset: Texts | None = None  # None: the held-out split, or the same text further on
    evaluation_split: str | None = None
    contrast_dataset: str | None = None  # for pruners that hold a second data set against the first
    calibration_tokens: Annotated[int, Field(gt=0)] | None = None
    search_tokens: Annotated[int, Field(gt=0)] | None = None
    recovery_tokens: Annotated[int, Field(gt=0)] | None = None
    evaluation_tokens: Annotated[int, Field(gt=0)] | None = None
    seqlen: Annotated[int, Field(ge=2)] | None = None  # None: 2048, or what the model was made for
    window_start: WindowStart = "auto"  # of all that is not evaluated: BOS where the tokenizer puts it, or none, or bos
    shuffle: bool = False  # draw windows by the seed, not the first in order
    calibration_draw: Annotated[int, Field(ge=0)] = 0  # which windows calibrate; all else stays the same
    digests: dict[str, str] | None = None  # sha256 of the token ids of each part and source, filled in by a run

    def texts(
        self, part: Literal["dataset", "search_dataset", "recovery_dataset", "evaluation_dataset"]
    ) -> tuple[TextSpec, ...]:
        """The data sets of one key, none where it is None.

        Raises:
            WrongInput: `config` or `split` beside several data sets.
        """
        value = getattr(self, part)
        splits = {"dataset": self.split, "evaluation_dataset": self.evaluation_split}
        if isinstance(value, str):
            config = self.config if part == "dataset" else None
            return (TextSpec(dataset=value, config=config, split=splits.get(part)),)
        if part == "dataset" and (self.config or self.split):
            raise WrongInput("data.config and data.split are of one data set; of several each has its own in the list")
        return tuple(t.model_copy(update={"split": t.split or splits.get(part)}) for t in value or ())

    @property
    def names(self) -> list[str]:
        """Every data set that is named."""
        mine = (self.dataset, self.search_dataset, self.recovery_dataset)
        parts = (*mine, self.evaluation_dataset, self.contrast_dataset)
        return [name for part in parts for name in names_of(part)]
