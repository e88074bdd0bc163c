"""Low rank by the singular values of what a map makes of its inputs, which are then the losses of truncation."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

import prunekit as pk
from prunekit_strategies.pruners.low_rank import LowRank


@dataclass(frozen=True)
class SVDLLM(LowRank):
    """Make two linear maps of one, the nearest of their rank on the inputs that were seen.

        S Sᵀ = H + λI                                S lower triangular (Cholesky)                  (1)
        W S = U Σ Vᵀ                                 singular value decomposition                   (2)
        Ŵ_r = (U_r) (Σ_r V_rᵀ S⁻¹) = (U_r) (U_rᵀ W)  rank r, two factors                           (3)
        E‖(W - Ŵ_r) x̂‖² = Σ_{i > r} σ_i²             at λ = 0: no other Ŵ of rank r has less       (4)

    Source: SVD-LLM (Wang et al. 2024, arXiv 2403.07378), truncation-aware data whitening, and its released code
    (AIoT-MLSys-Lab/SVD-LLM). The second form of (3) is derived; it needs no inverse, and every rank is priced exactly
    on H itself (`LayerProblem.truncated`). As there, all linear maps of a block are factored, and one share of the
    parameters is one rank, ⌊share · d_out d_in / (d_out + d_in)⌋, with allocator uniform. Where ours differs:

    - λ is the recipe's `damping`; there it is 0 where H has a Cholesky factor, else what makes its least eigenvalue
      10⁻⁶ in sums over tokens.
    - H is of what earlier factored maps hand on; in the released code of the dense model's inputs, as with
      `carry: dense` (preset `svd-llm`).
    - Factors have rows and columns of equal norms; there √Σ is given to each. The product is the same.
    - What follows there, the update of U on inputs of the compressed model in the code, or training one factor after
      the other with LoRA in the paper, is not here; the finisher `lora` trains both factors at once.
    """

    def scaled(self, layer: pk.LayerProblem) -> Float[Tensor, "d_out d_in"]:
        return layer.target @ pk.factored(layer.hessian)  # (1), (2)
