"""The model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunekit.recipe.schema import Recipe
from prunekit.report.document import gained, kept_promise, parts_of, promise
from prunekit.system.files import write_json


def card(document: Mapping[str, Any], recipe: Recipe) -> str:
    """README.md of a pruned model."""
    dense, pruned, losses = document["dense"], document["pruned"], document["losses"]
    name = Path(str(document["model"])).name
    parts = ", ".join(f"{kind} `{spec['name']}`" for kind, spec in parts_of(recipe))
    rows = "\n".join(
        f"| {site['name']} | {site.get('keeps') or '{:,} of {:,}'.format(site['kept'], site['groups'])} "
        f"| {site['error']:.4f} |"
        for site in document["sites"]
    )
    title, unit, more, note = f"{pruned['sparsity_of_blocks']:.1%} of the block parameters removed", "groups", "", ""
    if (found := document.get("weights")) is not None:
        title, unit = f"{found['sparsity']:.1%} of the weights in the blocks' linear maps are zero", "weights per row"
        more = f"\n| not zero in linear maps | {found['in_linear_maps']:,} | {found['not_zero']:,} |"
        note = f"\n{gained(found)}\n"
    if (pace := promise(document)) is not None:
        if (ms := pace.get("milliseconds")) is not None:
            more += f"\n| milliseconds | {ms['dense']:.4g} | {ms['pruned']:.4g} |"
        where = f"Time on {pace['hardware']['device']}" if ms is not None else document["budget"]["metric"].capitalize()
        note += f"\n{where}: {kept_promise(pace)}.\n"
    return f"""---
base_model: {document["model"]}
tags: [prunekit, pruned]
library_name: transformers
---

# {name}, {title}

Pruned by prunekit {document["versions"]["prunekit"]} with {parts}.

| | dense | pruned |
|---|---|---|
| parameters | {dense["parameters"]:,} | {pruned["parameters"]:,} |
| in blocks | {dense["block_parameters"]:,} | {pruned["block_parameters"]:,} |{more}
| perplexity | {losses["dense"]["perplexity"]:.2f} | {losses["pruned"]["perplexity"]:.2f} |

Perplexity: `{losses["pruned"]["label"]}`. Calibration and search: {document["data"]["source"]}.
{note}
## Load

```python
import prunekit  # registers model classes whose layers differ in size; not needed where all are equal
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```

`prunekit prune --recipe recipe.yaml --output DIR` makes it again.

## Sites

| site | kept {unit} | relative output error |
|---|---|---|
{rows}
"""


def write(document: Mapping[str, Any], recipe: Recipe, folder: Path) -> None:
    """report.json and README.md."""
    write_json(folder / "report.json", document)
    (folder / "README.md").write_text(card(document, recipe), encoding="utf-8")
