"""The model card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from prunekit.models.configs import CONFIG, auto_class
from prunekit.models.opening import converted_as
from prunekit.recipe.schema import Recipe
from prunekit.report.document import gained, kept_promise, parts_of, promise
from prunekit.report.origin import hub_id, taken_over
from prunekit.report.picture import draw
from prunekit.system.files import read_json, write_bytes, write_json

PICTURE = "sparsity.svg"
TASKS = {  # of the hub, by the class of transformers that loads a model
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
}


def card(
    document: Mapping[str, Any], recipe: Recipe, facts: Mapping[str, Any], auto: str = "AutoModelForCausalLM"
) -> str:
    """Write the text of README.md of a pruned model.

    Args:
        document: the report.
        recipe: what it was made by.
        facts: licence and language of the source, for the front matter.
        auto: name of the class of transformers that loads the model.
    """
    dense, pruned, losses = document["dense"], document["pruned"], document["losses"]
    source = str(document["model"])
    name = _line(Path(source).name or Path(source).resolve().name)
    base = {} if hub_id(source) is None else {"base_model": source}
    head = {
        **base,
        "tags": ["prunekit", "pruned"],
        "library_name": "transformers",
        "pipeline_tag": TASKS[auto],
        **facts,
    }
    parts = ", ".join(f"{kind} `{spec['name']}`" for kind, spec in parts_of(recipe))
    rows = "\n".join(
        f"| {site['name']} | {site.get('keeps') or '{:,} of {:,}'.format(site['kept'], site['groups'])} "
        f"| {site['error']:.4f} |"
        for site in document["sites"]
    )
    title, unit, more, note = f"{pruned['sparsity_of_blocks']:.1%} of the block parameters removed", "groups", "", ""
    if any("keeps" in site for site in document["sites"]):
        unit = "rank"
    if (narrow := document.get("width")) is not None:
        more += f"\n| residual width | {narrow['of']:,} | {narrow['channels']:,} |"
        note += "\nEmbedding and head are two matrices now, where the dense model has one.\n" * narrow["untied"]
        note += _shares(narrow)
    if (layers := document.get("experts")) is not None:
        more += f"\n| experts | {sum(each['of'] for each in layers):,} | {sum(each['kept'] for each in layers):,} |"
    if (found := document.get("weights")) is not None:
        title, unit = f"{found['sparsity']:.1%} of the weights in the blocks' linear maps are zero", "weights per row"
        more = f"\n| not zero in linear maps | {found['in_linear_maps']:,} | {found['not_zero']:,} |"
        note = f"\n{gained(found)}\n"
    if (pace := promise(document)) is not None:
        if (ms := pace.get("milliseconds")) is not None:
            more += f"\n| milliseconds | {ms['dense']:.4g} | {ms['pruned']:.4g} |"
        where = f"Time on {pace['hardware']['device']}" if ms is not None else document["budget"]["metric"].capitalize()
        note += f"\n{where}: {kept_promise(pace)}.\n"
    if limited := document.get("search", {}).get("limited"):
        note += f"\nThe search was ended early: {_line(str(limited))}.\n"
    if "converted" in dense:
        note += f"\n{converted_as('The checkpoint', dense['converted'], dense['dtype'])}.\n"
    return f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---

# {name}, {title}

Pruned by prunekit {document["versions"]["prunekit"]} with {parts}.

| | dense | pruned |
|---|---|---|
| parameters | {dense["parameters"]:,} | {pruned["parameters"]:,} |
| in blocks | {dense["block_parameters"]:,} | {pruned["block_parameters"]:,} |{more}
| perplexity | {losses["dense"]["perplexity"]:.2f} | {losses["pruned"]["perplexity"]:.2f} |

Perplexity: `{losses["pruned"]["label"]}`. Calibration and search: {_named(document["data"]["source"], recipe)}.
{note}
## Load

```python
import prunekit  # registers model classes whose layers differ in size; not needed where all are equal
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```

`prunekit prune --recipe recipe.yaml --output DIR` makes it again.

{_written(document["samples"]) if document.get("samples") else ""}## Sites

![Share removed of every block, attention and MLP apart]({PICTURE})

| site | kept {unit} | relative output error |
|---|---|---|
{rows}
"""


def write(document: Mapping[str, Any], recipe: Recipe, folder: Path) -> None:
    """Write report.json, README.md with its picture, and what is taken over from the source."""
    facts, legal = taken_over(str(document["model"]))
    write_json(folder / "report.json", document)
    for name, content in legal.items():
        write_bytes(folder / name, content)
    narrow = document.get("width", {"channels": 1, "of": 1})
    write_bytes(folder / PICTURE, draw(document["sites"], narrow["channels"] / narrow["of"]).encode())
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    write_bytes(folder / "README.md", card(document, recipe, facts, auto_class(config).__name__).encode())


def _shares(narrow: Mapping[str, Any]) -> str:
    """What was found with every share of the residual width, where several were tried."""
    rows = [
        f"| {each['share']:g}{' (taken)' * (each['share'] == narrow['share'])} | {each['channels']:,} | "
        f"{'not finite' if each['loss'] is None else format(each['loss'], '.4g')} | "
        f"{each['token_forwards'] + each['judged']:,} |"
        for each in narrow.get("shares", ())
    ]
    head = ["", "| share of the width | channels | loss | token-forwards |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""]) if rows else ""


def _written(samples: Sequence[Mapping[str, Any]]) -> str:
    """What both models write, as indented lines, which no text can leave."""
    rows = ("\n".join(f"    {who:7}{_line(one[who])}" for who in ("prompt", "dense", "pruned")) for one in samples)
    return "## What it writes\n\nAlways the likeliest token:\n\n" + "\n\n".join(rows) + "\n\n"


def _line(text: str) -> str:
    """On one line, without what is no letter."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _named(source: str, recipe: Recipe) -> str:
    """Name the data sets, files by their name alone: a card holds no path of this machine."""
    for name in sorted(recipe.data.names, key=len, reverse=True):
        if hub_id(name) is None:
            source = source.replace(name, re.split(r"[/\\]", name)[-1])
    return _line(source)
