"""MLPs refitted map by map: each step is the least-squares answer it claims, and none raises the error."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from prunekit.errors import WrongInput
from prunekit.models.adapters.find import adapter_for
from prunekit.testing import toy_supernet, toy_workpiece
from prunekit_strategies.finishers.alternating import MLP, Alternating


class Gated(nn.Module):
    """W_d (silu(W_g x) ∘ W_u x), in float64."""

    def __init__(self, seed: int, d: int = 4, width: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((d, width), (d, width), (width, d)))
        for linear in (self.gate, self.up, self.down):
            values = torch.randn(linear.weight.shape, generator=generator, dtype=torch.float64)
            linear.weight = nn.Parameter(values, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


@pytest.fixture
def mlp() -> MLP:
    """An MLP that is to do what one of other weights does, on 50 tokens in two chunks."""
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = Gated(1, width=6)(x)
    return MLP(Gated(0), ["gate", "up"], "down", x.split(30), y.split(30))


def test_it_is_linear_in_up_and_not_in_the_gate(mlp: MLP) -> None:
    assert mlp.linear_in("up")
    assert mlp.linear_in("down")
    assert not mlp.linear_in("gate")


def test_the_last_map_is_the_least_squares_fit(mlp: MLP) -> None:
    x, y = torch.cat(list(mlp.inputs)), torch.cat(list(mlp.wanted))
    hidden = functional.silu(mlp.map("gate")(x)) * mlp.map("up")(x)
    best = torch.linalg.lstsq(hidden, y).solution.T
    mlp.solve_last(damping=0)
    torch.testing.assert_close(mlp.map("down").weight.data, best)


def test_conjugate_gradients_come_to_the_least_squares_fit_of_up(mlp: MLP) -> None:
    """Σ_t ‖y_t - D diag(g_t) U x_t‖², as one dense problem in the twelve entries of U."""
    x, y = torch.cat(list(mlp.inputs)), torch.cat(list(mlp.wanted))
    down, gate = mlp.map("down").weight, functional.silu(mlp.map("gate")(x))
    design = torch.einsum("ok,tk,tj->tokj", down, gate, x).reshape(50 * 4, 3 * 4)
    best = torch.linalg.lstsq(design, y.reshape(-1, 1)).solution.reshape(3, 4)
    mlp.conjugate("up", 60)  # twelve entries, and rounding
    torch.testing.assert_close(mlp.map("up").weight.data, best, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("step", ["conjugate", "descend"])
def test_no_single_step_raises_the_error(mlp: MLP, step: str) -> None:
    found = [mlp.error()]
    for _ in range(6):
        getattr(mlp, step)("up" if step == "conjugate" else "gate", 1)
        found.append(mlp.error())
    assert all(after < before for before, after in itertools.pairwise(found))


def test_rounds_never_raise_the_error_and_gain_more_than_the_last_map_alone(mlp: MLP) -> None:
    found = Alternating(rounds=5, damping=0).refit(mlp)
    assert len(found) == 6
    assert all(after <= before for before, after in itertools.pairwise(found))
    other = MLP(Gated(0), ["gate", "up"], "down", mlp.inputs, mlp.wanted)
    assert found[-1] < 0.8 * Alternating(rounds=1, conjugate=0, descent=0, damping=0).refit(other)[-1]


def test_what_is_right_already_stays() -> None:
    module = Gated(0)
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert max(Alternating().refit(MLP(module, ["gate", "up"], "down", [x], [module(x)]))) < 1e-20
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "phi3", "falcon"])
def test_the_error_of_every_mlp_falls_and_attention_stays(family: str) -> None:
    piece = toy_workpiece(toy_supernet(family))
    before = {name: value.clone() for name, value in piece.model.state_dict().items()}
    errors = Alternating(rounds=2, conjugate=2, descent=2, aim="own").finish(piece)["errors"]
    assert list(errors) == [site.name for site in piece.sites if site.kind == "mlp"]
    for found in errors.values():
        assert found[-1] < found[0]
        assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(found))
    changed = {name for name, value in piece.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".mlp." in name and name.endswith("weight") for name in changed)


def test_families_whose_mlp_is_no_module_are_refused() -> None:
    with pytest.raises(WrongInput, match=r"works on MLPs that are one module, which .* has not; take least-squares"):
        Alternating().check(adapter_for("opt"))
    with pytest.raises(ValueError, match="rounds and tokens are at least 1"):
        Alternating(rounds=0)
