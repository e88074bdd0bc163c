"""`prunekit evaluate`: how good and how fast a model is."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from prunekit.cli.completion import one_of
from prunekit.cli.options import (
    DATASET_HELP,
    DEVICES,
    DTYPE,
    MACHINE,
    TEXT,
    Json,
    JsonLines,
    Model,
    ModelOption,
    Quiet,
    Trust,
    given_model,
    needed_model,
    option,
)
from prunekit.cli.quiet import quiet_libraries
from prunekit.cli.tables import format_bytes, new_table, print_table

SPLIT = "Split of the data set; otherwise a held-out one."
FIELD = "Fields of rows with the text, as a, a.b or a,b; otherwise text, or a conversation."
SEQLEN = "Number of tokens per window; otherwise 2048, or the model's maximum."
TOKENS = "Number of tokens from the start of the text; otherwise all."
SAMPLES = "Number of prompts that the model continues, always with the likeliest token; at most 10."
AGAINST = "Second model, timed in turns with the first."


def evaluate(
    model: Model = None,
    *,
    model_option: ModelOption = None,
    trust_remote_code: Trust = False,
    dataset: Annotated[str, option(DATASET_HELP, TEXT)] = "python-docs",
    split: Annotated[str | None, option(SPLIT, TEXT)] = None,
    field: Annotated[str | None, option(FIELD, TEXT)] = None,
    seqlen: Annotated[int | None, option(SEQLEN, TEXT, metavar="N", min=2)] = None,
    tokens: Annotated[int | None, option(TOKENS, TEXT, metavar="N", min=1)] = None,
    samples: Annotated[int, option(SAMPLES, TEXT, metavar="N", min=0, max=10)] = 0,
    device: Annotated[
        str, option("auto, cpu, cuda or cuda:1.", MACHINE, autocompletion=one_of(lambda: DEVICES))
    ] = "auto",
    dtype: Annotated[str, DTYPE] = "auto",
    against: Annotated[str | None, option(AGAINST, MACHINE, metavar="MODEL")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    json_lines: JsonLines = None,
) -> dict[str, Any]:
    """Measure perplexity, size and speed of a model, dense or pruned."""
    name = needed_model(given_model(model, model_option), "prunekit evaluate MODEL")
    from prunekit.models.places import check_device

    check_device(device)
    from prunekit.data.spec import DataSpec
    from prunekit.measure.evaluate import evaluate as measure
    from prunekit.measure.rounds import Ratio
    from prunekit.system.progress import progress_for

    quiet_libraries()
    data = DataSpec(
        dataset=dataset, split=split, evaluation_split=split, field=field, seqlen=seqlen, evaluation_tokens=tokens
    )
    progress = progress_for(quiet)
    found = measure(
        name, data, device=device, dtype=dtype, trust_remote_code=trust_remote_code, against=against, prompts=samples,
        progress=progress,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return found
    table = new_table(name)
    table.add_row("perplexity", f"{found['perplexity']:.2f}")
    table.add_row("loss", f"{found['nll']:.4f} ± {found['standard_error']:.4f} nats per token")
    table.add_row("measured as", found["label"])
    table.add_row("parameters", f"{found['parameters']:,}")
    table.add_row("weights", format_bytes(found["bytes"]))
    table.add_row("zeros", f"{found['zeros']:.2%} of the weights of linear maps")
    for what in ("prefill", "decode"):
        low, high = found[f"{what}_tokens_per_second_middle_half"]
        middle = f"tokens/s, half of the rounds {low:,.1f} to {high:,.1f}"
        table.add_row(what, f"{found[f'{what}_tokens_per_second']:,.1f} {middle}")
        if (other := found.get("against")) is not None:
            ratio = Ratio(other[f"{what}_ratio"], *other[f"{what}_ratio_interval"])
            table.add_row(f"{what}, ratio", f"{ratio}; {against} has {other[f'{what}_tokens_per_second']:,.1f}")
    table.add_row("timed as", found["timed"])
    print_table(table)
    for sample in found.get("samples", ()):
        typer.echo(f"\n{sample['prompt']} |{sample['text']}")
    return found
