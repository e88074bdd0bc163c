"""`prunekit evaluate`: how good and how fast a model is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
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
    split_names,
    switch,
)
from prunekit.cli.quiet import quiet_libraries
from prunekit.cli.tables import format_bytes, new_table, print_table

SPLIT = "Split of the data set; otherwise a held-out one."
FIELD = "Fields of rows with the text, as a, a.b or a,b; otherwise text, or a conversation."
SEQLEN = "Number of tokens per window; otherwise 2048, or the model's maximum."
TOKENS = "Number of tokens from the start of the text; otherwise 65536, or all that there are."
SAMPLES = "Number of prompts that the model continues, always with the likeliest token; at most 10."
AGAINST = "Second model, such as the dense one, judged on the same text and tasks and timed in turns with the first."
TASKS = "Tasks"
HARNESS = (
    "Tasks of lm-evaluation-harness: names, pruning-suite, .yaml or .jsonl files. Repeatable, or several by comma."
)
HARNESS_PATH = "Folder of task files, whose tasks --harness names."
CHAT_TEMPLATE = "Prompts of tasks as messages, by the tokenizer's chat template."
LIMIT = "Number of items of each task, from its first; otherwise all."
BATCH = "Number of prompts of tasks in a forward pass; otherwise as many as keep the logits small."


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
    harness: Annotated[list[str] | None, option(HARNESS, TASKS, metavar="TASKS")] = None,
    harness_path: Annotated[str | None, option(HARNESS_PATH, TASKS, metavar="FOLDER")] = None,
    chat_template: Annotated[bool, switch(CHAT_TEMPLATE, TASKS, "--chat-template")] = False,
    limit: Annotated[int | None, option(LIMIT, TASKS, metavar="N", min=1)] = None,
    batch_size: Annotated[int | None, option(BATCH, TASKS, metavar="N", min=1)] = None,
    device: Annotated[
        str, option("auto, cpu, cuda or cuda:1.", MACHINE, autocompletion=one_of(lambda: DEVICES))
    ] = "auto",
    dtype: Annotated[str, DTYPE] = "auto",
    against: Annotated[str | None, option(AGAINST, MACHINE, metavar="MODEL")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    json_lines: JsonLines = None,
) -> dict[str, Any]:
    """Measure perplexity, tasks, size and speed of a model, dense or pruned, of any family."""
    name = needed_model(given_model(model, model_option), "prunekit evaluate MODEL")
    from prunekit.models.places import check_device

    check_device(device)
    from prunekit.data.harness import HarnessSpec, check_installed, check_names

    names = split_names(harness)
    if names or harness_path or chat_template or limit or batch_size:
        check_names(names or (), harness_path)
        check_installed()
    from prunekit.data.spec import DataSpec
    from prunekit.measure.evaluate import evaluate as measure
    from prunekit.measure.ratios import Ratio
    from prunekit.system.progress import progress_for

    quiet_libraries()
    data = DataSpec(
        dataset=dataset, split=split, evaluation_split=split, field=field, seqlen=seqlen, evaluation_tokens=tokens
    )
    asked = None if names is None else HarnessSpec(tuple(names), harness_path, chat_template, limit, batch_size)
    progress = progress_for(quiet)
    found = measure(
        name, data, device=device, dtype=dtype, trust_remote_code=trust_remote_code, against=against, prompts=samples,
        harness=asked, progress=progress,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return found
    table = new_table(name)
    other = found.get("against")
    table.add_row("perplexity", f"{found['perplexity']:.2f}" + _of_other(other, "perplexity", ".2f", against))
    table.add_row("loss", f"{found['nll']:.4f} ± {found['standard_error']:.4f} nats per token")
    if other is not None and "nll_rise" in other:
        rise, error = other["nll_rise"], other["nll_rise_standard_error"]
        table.add_row("loss, rise", f"{rise:+.4f} ± {error:.4f} nats per token over {against}, window by window")
    bits = f"{found['bits_per_byte']:.4f}" + _of_other(other, "bits_per_byte", ".4f", against)
    table.add_row("bits per byte", bits)
    table.add_row("measured as", found["label"])
    table.add_row("parameters", f"{found['parameters']:,}")
    table.add_row("weights", format_bytes(found["bytes"]))
    table.add_row("zeros", f"{found['zeros']:.2%} of the weights of linear maps")
    for what in ("prefill", "decode") if "timed" in found else ():
        low, high = found[f"{what}_tokens_per_second_middle_half"]
        middle = f"tokens/s, half of the rounds {low:,.1f} to {high:,.1f}"
        table.add_row(what, f"{found[f'{what}_tokens_per_second']:,.1f} {middle}")
        if other is not None:
            ratio = Ratio(other[f"{what}_ratio"], *other[f"{what}_ratio_interval"])
            table.add_row(f"{what}, ratio", f"{ratio}; {against} has {other[f'{what}_tokens_per_second']:,.1f}")
    if "timed" in found:
        table.add_row("timed as", found["timed"])
    print_table(table)
    if (tasks := found.get("harness")) is not None:
        typer.echo()
        print_table(_task_table(tasks, name, against))
    for sample in found.get("samples", ()):
        typer.echo(f"\n{sample['prompt']} |{sample['text']}")
    return found


def _of_other(other: Mapping[str, Any] | None, key: str, style: str, name: str | None) -> str:
    return "" if other is None else f"; {name} has {other[key]:{style}}"


def _task_table(found: Mapping[str, Any], name: str, against: str | None) -> Any:
    """Make a table of tasks: a row for each metric, its standard error behind it; of two models with the difference."""
    table = new_table("task", "metric", "items", name, *([] if against is None else [against, "difference", "p"]))
    table.columns[1].justify = "left"
    for row in _task_rows(found):
        table.add_row(*row[: len(table.columns)])
    table.caption = "± standard error over items" + (
        "" if against is None else "; the difference is paired, item by item; p of McNemar's exact test"
    )
    table.caption_justify = "left"
    return table


def _task_rows(found: Mapping[str, Any]) -> Iterator[list[str]]:
    for task, row in found["tasks"].items():
        for metric, cell in row["metrics"].items():
            yield [task, metric, f"{row['items']:,}", *_scores(cell)]
    for group, row in found["groups"].items():
        for metric, cell in row["metrics"].items():
            yield [group, metric, "", *_scores(cell)]
    for metric, cell in found["means"].items():
        yield ["mean", metric, "", *_scores(cell)]


def _scores(cell: Mapping[str, Any]) -> list[str]:
    apart = cell.get("difference", {})
    changed = f" ({apart['gained']} gained, {apart['lost']} lost)" if "gained" in apart else ""
    p = f"{apart['p']:.3f}" if "p" in apart else ""
    return [_score(cell), _score(cell.get("against", {})), _score(apart, "+") + changed, p]


def _score(cell: Mapping[str, Any], sign: str = "") -> str:
    if cell.get("value") is None:
        return "not finite" if cell else ""
    error = f" ± {cell['standard_error']:.4f}" if cell["standard_error"] is not None else ""
    return f"{cell['value']:{sign}.4f}{error}"
