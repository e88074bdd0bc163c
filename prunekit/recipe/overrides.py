"""What is said beside a recipe: KEY=VALUE, targets, families of sparsities. All of it is plain values.

What options a plug-in has is not known here: `resolve` refuses those that it does not have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from prunekit.data.spec import as_texts, names_of
from prunekit.errors import WrongInput, unknown
from prunekit.recipe.plain import read_plain
from prunekit.recipe.specs import as_engine, as_pattern, as_spec, as_specs, own_share

PLUGINS = ("pruner", "allocator", "learner", "width", "objective", "engine")  # keys with one plug-in each
LISTS = {"finishers": "finisher", "exporters": "exporter"}  # keys with several in turn
MOST_DIGITS = 40  # of a share
HUGE = re.compile(r"[eE][+-]?\d{3}")  # an exponent whose power of ten alone would take for ever


def parsed(assignment: str) -> tuple[str, Any]:
    """Read `key.path=value`, the value as YAML.

    Args:
        assignment: as it is given to --set.

    Returns:
        (the dotted key, the value).

    Raises:
        WrongInput: it is not of that form.
    """
    key, equals, value = assignment.partition("=")
    if not (key.strip() and equals):
        raise WrongInput(f"--set takes key.path=value, not {assignment!r}; as in --set pruner.refit=true")
    return key.strip(), read_plain(value, f"--set {key.strip()}")


def expand_target(values: Mapping[str, Any]) -> dict[str, Any]:
    """Write a target as what it is short for: a metric, and the sparsity that keeps its share.

    Args:
        values: recipe keys; `target`, where it is there, as "latency=0.6" or {"latency": 0.6}.

    Returns:
        The values with metric and sparsity in its place.

    Raises:
        WrongInput: it is no target, or stands beside what it says.
    """
    rest = dict(values)
    target = rest.pop("target", None)
    if target is None:
        return rest
    if beside := [key for key in ("sparsity", "metric") if key in rest]:
        raise WrongInput(
            f"target says which metric keeps how much, so {' and '.join(beside)} cannot be given too; "
            "--sparsity 0.4 is the same as --target parameters=0.6"
        )
    pairs = target.items() if isinstance(target, Mapping) else [str(target).partition("=")[::2]]
    if len(pairs) != 1:
        raise WrongInput(f"a target is one METRIC=SHARE, as in latency=0.6, not {target!r}")
    ((metric, text),) = pairs
    if text == "":
        raise WrongInput(f"a target is one METRIC=SHARE, as in latency=0.6, not {target!r}")
    try:
        share = Fraction(0) if len(str(text)) > MOST_DIGITS or HUGE.search(str(text)) else Fraction(str(text))
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share < 1:
        raise WrongInput(f"target {metric} is the share that stays, more than 0 and less than 1, not {text!r}")
    return rest | {"metric": metric, "sparsity": float(1 - share)}


def split_family(overrides: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Split a list of sparsities, or a target of several shares, into overrides with one each.

    Args:
        overrides: dotted recipe key -> value.

    Returns:
        One set of overrides for each sparsity, in the order given; None: there is no list.
    """
    key = "target" if "target" in overrides else "sparsity"
    metric, equals, shares = str(overrides.get(key)).partition("=")
    if key == "target" and "," in shares:
        values: Sequence[Any] = [f"{metric}{equals}{share}" for share in shares.split(",")]
    elif isinstance(overrides.get("sparsity"), (list, tuple)):
        values = overrides["sparsity"]
    else:
        return None
    return [{**overrides, key: value} for value in values]


def override(recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Replace values of a recipe, and let go of what belonged to the old ones.

    Args:
        recipe: all its values, plain; containers among them may be changed.
        overrides: dotted recipe key -> value.

    Returns:
        The values of the other recipe, not validated.

    Raises:
        WrongInput: no such key, with the nearest; or what is no target.
    """
    values, overrides = dict(recipe), expand_target(overrides)
    if not {"latency.prices", "metric.prices"} & overrides.keys() and _is_other_to_time(values, overrides):
        for part in (values["latency"], values["metric"]):
            if isinstance(part, dict) and part.get("prices"):
                part["prices"] = None
    data = values["data"]
    if as_texts(overrides.get("data.dataset", data["dataset"])) != data["dataset"]:
        forgotten = ["config", "split"]  # they are of the other data set
        if data["evaluation_dataset"] is None or _names(data["evaluation_dataset"]) == _names(data["dataset"]):
            forgotten += ["evaluation_dataset", "evaluation_split"]
        values["data"] |= dict.fromkeys(forgotten)
    if overrides.get("model", values["model"]) != values["model"] and data.get("digests"):
        values["data"]["window_start"] = "auto"  # a run has found it for the tokenizer of the other model
    before, structure = values["structure"], as_pattern(overrides.get("structure", values["structure"]))
    if "sparsity" not in overrides and structure != before and (own_share(structure) or own_share(before)):
        values.pop("sparsity")  # a pattern has its own; what follows one has the default
        values["family"] = ()
    if "sparsity" in overrides:
        values["family"] = ()  # it was of the other
    _let_the_other_go(values, overrides)
    for key in sorted(overrides, key=lambda key: key.count(".")):  # a plug-in before its options
        _put(values, key, overrides[key])
        if key.split(".")[0] in ("data", "model", "seed") and isinstance(values["data"], dict):
            values["data"]["digests"] = None
    return values


def _let_the_other_go(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """An allocator takes a learner's place and a learner an allocator's; what was taken over of a learner goes too."""
    for key, other in (("learner", "allocator"), ("allocator", "learner")):
        if overrides.get(key) is not None and overrides.get(other) is None:
            values[other] = None
    if "learned" not in overrides:
        changed = any(key.split(".")[0] == "learner" for key in overrides)  # and may train no weights
        if overrides.get("allocator") is not None or (changed and values["learned"] == "weights"):
            values["learned"] = None


def _is_other_to_time(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> bool:
    """Whether overrides change what a price table was measured on, where that was said."""
    now = {key: values[key] for key in ("model", "heads", "device", "dtype")}
    now |= {f"latency.{key}": value for key, value in values["latency"].items()}
    return "latency" in overrides or any(now.get(key) not in (None, value) for key, value in overrides.items())


def _names(texts: Any) -> list[str]:
    return names_of(texts) if isinstance(texts, str) else [text["dataset"] for text in texts]


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    slot, *path = key.split(".")
    if slot not in values:
        raise WrongInput(unknown("recipe key", slot, values))
    if slot == "metric":
        _put_metric(values, path, value)
    elif slot in LISTS:
        values[slot] = _listed(LISTS[slot], values[slot], path, value)
    elif slot in PLUGINS:
        _put_option(values, [slot, *path], as_engine(value) if key == "engine" else value)
    else:
        merged = key in ("data", "latency") and isinstance(value, Mapping)
        _put_value(values, [slot, *path], {**values[key], **value} if merged else value)


def _put_value(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Replace what is at the end of a path."""
    here, name = values, path[0]
    for step in path[1:]:
        here, parent, name = here[name], name, step
        if not isinstance(here, dict) or name not in here:
            there = [f"{parent}.{option}" for option in here] if isinstance(here, dict) else []
            raise WrongInput(unknown("recipe key", f"{parent}.{name}", there))
    here[name] = value


def _put_option(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Write an option at the end of a path through plug-ins; naming the plug-in that is there keeps its options."""
    here = values
    for step in path[:-1]:
        inner = as_spec(here.get(step))
        here[step] = dict(inner) if isinstance(inner, Mapping) else {}
        here = here[step]
    old = here.get(path[-1])
    if not (isinstance(value, str) and isinstance(old, Mapping) and old.get("name") == value):
        here[path[-1]] = value


def _put_metric(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Write a metric, or an option of it; those of metric latency are in a section of their own."""
    now = values["metric"]
    if not path:
        named = isinstance(now, Mapping) and now.get("name") == value
        values["metric"] = now if named else value
    elif isinstance(values.get(str(now)), dict):
        _put_value(values, [str(now), *path], value)
    else:
        _put_option(values, ["metric", *path], value)


def _listed(kind: str, now: Iterable[Any], path: Sequence[str], value: Any) -> Any:
    """Plug-ins with `NAME.option` replaced wherever that one is; or, without a path, new ones: a list, or one."""
    if not path:
        return as_specs(value)
    specs = [as_spec(each) for each in now]
    names = [spec.get("name") for spec in specs if isinstance(spec, Mapping)]
    if path[0] not in names:
        raise WrongInput(unknown(f"{kind} of this recipe", path[0], names))
    for i, spec in enumerate(specs):
        if isinstance(spec, Mapping) and spec.get("name") == path[0]:
            own = {path[0]: spec}
            _put_option(own, path, value)
            specs[i] = own[path[0]]
    return specs
