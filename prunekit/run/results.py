"""A pruned model and how it came to be: packed, saved, verified in a fresh process, loaded again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from prunekit.data.tokens import TokenBatch
from prunekit.errors import CannotGoOn, NotVerified
from prunekit.export import hf
from prunekit.export.write import prove, write
from prunekit.models import paging
from prunekit.models.opening import load_tokenizer, loaded, stored_as
from prunekit.plugins.exporter import Probe, Product
from prunekit.plugins.registry import EXPORTERS
from prunekit.recipe.schema import Recipe
from prunekit.report import document as reporting
from prunekit.report.card import write as write_report
from prunekit.run.session import write_prices
from prunekit.run.stages import Run
from prunekit.run.workplace import check_output, new_folder
from prunekit.search.supernet import Supernet
from prunekit.space.sites import Allocation
from prunekit.system.files import read_json

PROBE = 1024  # tokens an export is verified on


@dataclass(frozen=True, eq=False)
class Result:
    """A pruned model and how it came to be."""

    model: PreTrainedModel
    tokenizer: Any
    recipe: Recipe  # complete: what was resolved is written in
    report: dict[str, Any]
    ledger: str  # JSON lines
    directory: Path | None = None
    probe: tuple[torch.Tensor, torch.Tensor] | None = None  # (ids, float32 logits) that an export must reproduce
    blocks: int | None = None  # bytes of blocks to hold at once, of a model that does not fit memory; None: it does

    @classmethod
    def load(cls, directory: str | Path, *, blocks: int | None = None) -> Result:
        """Load a result that was saved, its model in the dtype of its file.

        Args:
            directory: of the result.
            blocks: bytes of blocks to hold at once; None: the model is loaded whole.

        Raises:
            WrongInput: there is no recipe, or no tokenizer.
        """
        folder = Path(directory)
        recipe, report = Recipe.load(folder), read_json(folder / "report.json")
        tokenizer = load_tokenizer(str(folder), recipe.trust_remote_code)
        ledger = (folder / "ledger.jsonl").read_text(encoding="utf-8")
        return cls(load_small(folder, recipe, blocks), tokenizer, recipe, report, ledger, folder, None, blocks)

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write weights, config, tokenizer, recipe, report, ledger and card; verified in a fresh process, then renamed.

        Args:
            directory: a new folder, or an empty one.
            overwrite: whether a result that is there may be replaced.

        Returns:
            The directory.

        Raises:
            WrongInput: the directory holds something and may not be overwritten.
            CannotGoOn: what was written is not the same model when it is loaded.
        """
        target = Path(directory)
        check_output(target, overwrite=overwrite)
        with new_folder(target) as folder:
            write_result(self, folder)
        return target


def make_export(
    run: Run, net: Supernet, plan: Allocation, small: PreTrainedModel
) -> tuple[PreTrainedModel, tuple[torch.Tensor, torch.Tensor]]:
    """Turn a small model into the one that will be exported.

    Args:
        run: the run that made it.
        net: the network that it was assembled from.
        plan: kept groups, or weights per row, by site.
        small: the model that was measured; afterwards in the dtype of the checkpoint.

    Returns:
        (the model as it is exported, the probe that verifies it, as of `make_probe`).
    """
    dense, tokens = run.dense, run.draws.evaluation
    if paging.pager_of(small) is None:
        probe = make_probe(stored_as(small.cpu(), dense.dtype), tokens)
        return hf.to_transformers(stored_as(small, dense.dtype), dense.adapter), probe
    paging.rest(small)
    cpu = torch.device("cpu")
    probe = make_probe(hf.paged(net, plan, torch.float32, cpu), tokens)
    return hf.paged(net, plan, dense.dtype, cpu), probe


@torch.no_grad()
def make_probe(model: nn.Module, tokens: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what an export must reproduce. The model's parameters are float32 afterwards; paged, it is at rest.

    Returns:
        (ids of a few windows, float32 logits of the model on them).
    """
    ids = tokens.first(PROBE).ids
    if paging.pager_of(model) is None:
        stored_as(model, torch.float32)
    logits = model(ids, use_cache=False).logits
    paging.rest(model)
    return ids, logits


def write_result(result: Result, folder: Path) -> None:
    """Write all files of a result; what exporters have written is verified before anyone can see it.

    Raises:
        CannotGoOn: what was written is not the same model when it is loaded.
    """
    exporters = [EXPORTERS.build(spec) for spec in result.recipe.exporters]
    write(exporters, Product(result.model, result.tokenizer, result.report, result.recipe.code), folder)
    write_prices(result.recipe, folder)
    (folder / "recipe.yaml").write_text(result.recipe.to_yaml())
    (folder / "ledger.jsonl").write_text(result.ledger)
    write_report(result.report, result.recipe, folder)
    if result.recipe.verify and result.probe is not None:
        try:
            paging.rest(result.model)
            prove(exporters, folder, Probe(*result.probe, reporting.count(result.model), result.blocks))
        except NotVerified as error:
            raise CannotGoOn(f"the result was not kept: {error}") from error


def load_small(folder: Path, recipe: Recipe, blocks: int | None) -> PreTrainedModel:
    """Load the model of a result in the dtype of its file.

    Args:
        folder: of the result.
        recipe: of the result.
        blocks: bytes of blocks to hold at once; None: the model is loaded whole.
    """
    trusted = recipe.trust_remote_code or recipe.code == "bundled"
    if blocks is None:
        return loaded(str(folder), dtype="auto", trust_remote_code=trusted)
    cpu = torch.device("cpu")
    return paging.opened(str(folder), lambda stored: stored, cpu, blocks, trust_remote_code=trusted)[0]
