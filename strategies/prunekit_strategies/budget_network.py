"""A small autoregressive transformer from a budget to what every site keeps, and its two files; no allocator itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prunekit import Space, WrongInput

TENSORS, FACTS = "learnt.safetensors", "learnt.json"
VERSION = 1


class Predictor(nn.Module):
    """r_i = σ(head of a causal transformer at token i).

    Token 0 is the budget, token i is r_{i-1} times the vector of site i. A share depends on the budget and on the
    shares of the sites in front of it, and on no later one.
    """

    def __init__(self, sites: int, width: int = 128, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.sizes = {"sites": sites, "width": width, "layers": layers, "heads": heads}
        self.budget = nn.Sequential(nn.Linear(1, width), nn.GELU(), nn.Linear(width, width))
        self.site = nn.Parameter(0.5 * torch.randn(sites, width))
        self.position = nn.Parameter(0.02 * torch.randn(sites, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 1)

    def forward(self, budgets: Tensor, shares: Tensor) -> Tensor:
        """What every site keeps.

        Args:
            budgets: (batch,) share of the price of all groups.
            shares: (batch, sites) known shares; that of the last site is not read.

        Returns:
            (batch, sites), each between 0 and 1.
        """
        first = self.budget(budgets[:, None])[:, None]
        tokens = torch.cat([first, shares[:, :-1, None] * self.site[1:]], 1) + self.position
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=tokens.dtype)
        return torch.sigmoid(self.head(self.blocks(tokens, mask=mask, is_causal=True))[..., 0])

    @torch.no_grad()
    def answer(self, budget: float) -> list[float]:
        """The shares for a budget, one site after the other."""
        shares = torch.zeros(1, self.sizes["sites"])
        for i in range(shares.shape[1]):
            shares[0, i] = self(torch.tensor([budget]), shares)[0, i]
        return shares[0].tolist()


def taught(
    budgets: Sequence[float],
    shares: Sequence[Sequence[float]],
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    **sizes: int,
) -> Predictor:
    """A predictor that was trained on pairs of a budget and its shares, by least squares.

    Args:
        budgets: of every pair.
        shares: of every pair, one for each site.
        steps: of Adam; the rate falls to zero along a cosine.
        batch: pairs of a step, drawn anew for each; all where there are no more.
        rate: at the start.
        seed: of the first weights and the draws; the global random state stays as it is.
        sizes: of `Predictor`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Predictor(len(shares[0]), **sizes)
    adam = torch.optim.Adam(model.parameters(), lr=rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    c, r = torch.tensor(budgets), torch.tensor(shares)
    draws = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(steps):
            some = torch.randperm(len(c), generator=draws)[:batch] if batch < len(c) else torch.arange(len(c))
            adam.zero_grad(set_to_none=True)
            (model(c[some], r[some]) - r[some]).square().mean().backward()
            adam.step()
            falling.step()
    return model.eval().requires_grad_(False)


def facts_of(space: Space) -> dict[str, Any]:
    """What a predictor is of: sites, their groups, and the metric of the budget."""
    return {
        "sites": [site.name for site in space.sites],
        "groups": [site.n_groups for site in space.sites],
        "unit": space.budget.metric.unit,
    }


def save(model: Predictor, facts: Mapping[str, Any], folder: Path) -> None:
    """Write both files."""
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / TENSORS)
    content = {"version": VERSION, "sizes": model.sizes, **facts}
    (folder / FACTS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load(path: str | Path) -> tuple[Predictor, dict[str, Any]]:
    """Read what `save` wrote: the folder, or one of its two files.

    Raises:
        WrongInput: it is not there, or damaged.
    """
    folder = Path(path).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if facts["version"] != VERSION:
            raise ValueError(f"version {facts['version']}")
        model = Predictor(**facts["sizes"])
        model.load_state_dict(load_file(folder / TENSORS))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise WrongInput(
            f"{path} is not what `prunekit learn-budgets` has written ({error}); give its folder as allocator.model"
        ) from error
    return model.eval().requires_grad_(False), facts


def share_of(space: Space) -> float:
    """A budget as a share of the price of all groups."""
    dense = sum(space.budget.price(site, site.n_groups) for site in space.sites)
    return space.budget.limit / max(dense, 1)
