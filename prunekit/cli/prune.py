"""`prunekit prune`: a smaller model, or a family of them."""

from __future__ import annotations

from typing import Annotated, Any

from typer import echo

from prunekit.cli.completion import RECIPES, one_of, plugins, several_of
from prunekit.cli.options import (
    CARRIES,
    DEVICES,
    DTYPE,
    EFFORTS,
    MACHINE,
    METHOD,
    RUN,
    TEXT,
    Work,
    choose_recipe,
    option,
    parse_shares,
    switch,
    works,
)
from prunekit.cli.quiet import quiet_libraries
from prunekit.cli.tables import comparison, members, print_table, rows_of_report

SPARSITY = (
    "Share of the blocks' parameters to remove (with --structure weights or 2:4, of the weights in their linear maps). "
    "Several by comma make a family of models."
)
TARGET = (
    "Share to keep, instead of --sparsity: parameters=0.5, bytes, flops, kv-cache, or latency=0.6 as measured on this "
    "machine. Several by comma make a family of models."
)
STRUCTURES = ("groups", "weights", "2:4", "low-rank")
STRUCTURE = "Unit of removal: groups (heads and neurons), weights, a pattern such as 2:4, or low-rank."
EFFORT = "quick, standard or thorough, instead of a recipe: fast, default, or default-recover, which trains."
RECIPE = "Preset, YAML file, or folder of a pruned model; default without it."
PRUNER = "Method that selects what to keep in one layer."
ALLOCATOR = "Method that decides how much each layer keeps."
OBJECTIVE = "Measure by which allocations are compared."
LEARNER = "Method that learns which heads and neurons stay, in the place of --allocator."
WIDTH = "Method that narrows the residual stream, before heads and neurons are removed."
FINISHER = "Recovery step after pruning, instead of the recipe's. Repeatable, in the order given."
EXPORTER = "Format of the result, beside the folder for transformers. Repeatable, or several by comma."
CARRY = "Activations passed on to the next block: dense, centre or expected."
CALIBRATION_TOKENS = "Number of tokens for layer statistics."
SEARCH_TOKENS = "Number of tokens for comparing allocations."
TIME = "Time that the run may take, e.g. 45m or 1h30m; it decides how much text, search and recovery there is."
ENGINE = "Place of the computation: local, ray or ray://HOST:PORT."
DEVICE = "auto, cpu, cuda or cuda:1; several devices by comma; cuda: all where one is too small."
MEMORY = "Memory to use, e.g. 8GiB; auto: what is free."


@works("the result", "run of the same recipe")
def prune(
    work: Work,
    *,
    sparsity: Annotated[Any, option(SPARSITY, metavar="SHARE", parser=parse_shares)] = None,
    target: Annotated[str | None, option(TARGET, metavar="METRIC=SHARE")] = None,
    structure: Annotated[str | None, option(STRUCTURE, autocompletion=one_of(lambda: STRUCTURES))] = None,
    effort: Annotated[
        str | None, option(EFFORT, METHOD, metavar="WORD", autocompletion=one_of(lambda: EFFORTS))
    ] = None,
    recipe: Annotated[str | None, option(RECIPE, METHOD, autocompletion=one_of(RECIPES))] = None,
    pruner: Annotated[str | None, option(PRUNER, METHOD, autocompletion=one_of(plugins("pruner")))] = None,
    allocator: Annotated[str | None, option(ALLOCATOR, METHOD, autocompletion=one_of(plugins("allocator")))] = None,
    learner: Annotated[str | None, option(LEARNER, METHOD, autocompletion=one_of(plugins("learner")))] = None,
    width: Annotated[str | None, option(WIDTH, METHOD, autocompletion=one_of(plugins("width")))] = None,
    objective: Annotated[str | None, option(OBJECTIVE, METHOD, autocompletion=one_of(plugins("objective")))] = None,
    finisher: Annotated[list[str] | None, option(FINISHER, METHOD, autocompletion=one_of(plugins("finisher")))] = None,
    exporter: Annotated[
        list[str] | None,
        option(EXPORTER, METHOD, "--format", "--exporter", autocompletion=several_of(plugins("exporter"))),
    ] = None,
    carry: Annotated[str | None, option(CARRY, METHOD, autocompletion=one_of(lambda: CARRIES))] = None,
    calibration_tokens: Annotated[int | None, option(CALIBRATION_TOKENS, TEXT, metavar="N")] = None,
    search_tokens: Annotated[int | None, option(SEARCH_TOKENS, TEXT, metavar="N")] = None,
    seqlen: Annotated[int | None, option("Number of tokens per window.", TEXT, metavar="N")] = None,
    engine: Annotated[str | None, option(ENGINE, MACHINE, autocompletion=one_of(plugins("engine")))] = None,
    device: Annotated[str | None, option(DEVICE, MACHINE, autocompletion=one_of(lambda: DEVICES))] = None,
    dtype: Annotated[str | None, DTYPE] = None,
    memory: Annotated[str | None, option(MEMORY, MACHINE, metavar="SIZE")] = None,
    time: Annotated[str | None, option(TIME, RUN, metavar="TIME")] = None,
    seed: Annotated[int | None, option("Random seed; the same seed gives the same model.", RUN, metavar="N")] = None,
    page: Annotated[bool, switch("A page about the result in it, report.html.", RUN, "--page/--no-page")] = True,
) -> dict[str, Any]:
    """Prune a model, e.g. prunekit prune MODEL --sparsity 0.5 --output DIR. The recipe has the other values."""
    chosen, source, several = choose_recipe(locals() | vars(work), "prune")
    output = work.place("the pruned model")
    from prunekit.report.document import gained, kept_promise, promise
    from prunekit.report.page import PAGE, can_draw
    from prunekit.run import prune as pruning
    from prunekit.run.family import FILE, family
    from prunekit.run.workplace import unfinished

    quiet_libraries()
    drawn = page and can_draw()
    with work.job(announce=not (work.quiet or unfinished(output)), page=drawn) as job:
        report = family(chosen, job).document if several else pruning.prune(chosen, job).report
    if several:
        from prunekit.cli.learn_budgets import any_budget

        print_table(members(str(output), report))
        if (learnt := report.get("budgets")) is not None:
            assert chosen.allocator is not None  # who has learnt
            echo(any_budget(chosen.allocator["name"], output / learnt))
        echo(f"details: {output / (PAGE if drawn else FILE)}")
        return {"output": output, "family": output / FILE, "members": report["members"]}
    print_table(comparison(str(output), *rows_of_report(report, source, output)))
    if "weights" in report:
        echo(gained(report["weights"]))
    if (found := promise(report)) is not None:
        echo(kept_promise(found))
    if drawn:
        echo(f"details: {output / PAGE}")
    elif page and not work.quiet:
        echo(f"for a page about it: pip install 'prunekit[page]', then prunekit report {output}")
    return {"output": output} | {key: report[key] for key in ("dense", "pruned", "losses")}
