"""`prunekit evaluate`: how good and how fast a model is."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from prunekit.cli.options import MACHINE, TEXT, Json, Model, ModelOption, Quiet, given_model, needed_model
from prunekit.cli.quiet import quiet_libraries
from prunekit.cli.tables import format_bytes, new_table, print_table


def evaluate(
    model: Model = None,
    *,
    model_option: ModelOption = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Permission to run code that comes with the model.")
    ] = False,
    dataset: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="python-docs, a text, jsonl or parquet file, or a data set on the hub.",
            rich_help_panel=TEXT,
        ),
    ] = "python-docs",
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Split of the data set; otherwise a held-out one.", rich_help_panel=TEXT),
    ] = None,
    field: Annotated[
        str,
        typer.Option(metavar="NAME", help="Field with the text in jsonl, parquet and hub rows.", rich_help_panel=TEXT),
    ] = "text",
    seqlen: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="Number of tokens per window; otherwise 2048, or the model's maximum.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Number of tokens from the start of the text; otherwise all.", rich_help_panel=TEXT
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:1.", rich_help_panel=MACHINE)
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Number format of the computation: auto, float32, bfloat16, float16 or float64.",
            rich_help_panel=MACHINE,
        ),
    ] = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity, size and speed of a model, dense or pruned."""
    name = needed_model(given_model(model, model_option), "prunekit evaluate MODEL")
    from prunekit.measure.evaluate import evaluate as measure
    from prunekit.system.progress import progress_for

    quiet_libraries()
    found = measure(
        name,
        dataset,
        split=split,
        field=field,
        seqlen=seqlen,
        tokens=tokens,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        progress=progress_for(quiet),
    )
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = new_table(name)
    table.add_row("perplexity", f"{found['perplexity']:.2f}")
    table.add_row("loss", f"{found['nll']:.4f} ± {found['standard_error']:.4f} nats per token")
    table.add_row("measured as", found["label"])
    table.add_row("parameters", f"{found['parameters']:,}")
    table.add_row("weights", format_bytes(found["bytes"]))
    table.add_row("zeros", f"{found['zeros']:.2%} of the weights of linear maps")
    table.add_row("prefill", f"{found['prefill_tokens_per_second']:,.0f} tokens/s on {found['device']}")
    table.add_row("decode", f"{found['decode_tokens_per_second']:,.1f} tokens/s on {found['device']}")
    print_table(table)
