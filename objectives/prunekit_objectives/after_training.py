"""Judge an allocation by what its small model can still learn: another objective, after a short training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import prunekit as pk
from prunekit_objectives.divergence import Divergence


@dataclass(frozen=True)
class AfterTraining(pk.Objective):
    """The inner loss of a model that was trained on a few tokens before it is judged.

    A copy of the pruned model learns the next tokens of recovery text by AdamW, one window a step, each weight that was
    removed held at zero:

        J(a) = inner(a after n tokens),    n = min(tokens, per_token · T)                   (1)

    with T the tokens that are judged on. All allocations learn from the same windows in the same order, so that they
    differ by their counts alone; nothing of what was learnt is kept. Every question costs 3 n token-forwards beside
    the T of the inner objective, which the ledger counts. With `tokens: 0` it is the inner objective.

    Source: DarwinLM (Tang et al., arXiv:2502.07780), training-aware selection: survivors of a stage are trained on
    10,000 to 200,000 tokens at 1e-5 and judged on 1,024 to 8,192. In the released code the windows differ from stage to
    stage, and nothing holds removed columns at zero, which grow back while a candidate learns.
    """

    inner: pk.Objective = field(default_factory=Divergence)
    tokens: int = 10_240  # to learn from, most; as many as there is recovery text
    rate: float = 1e-5  # of AdamW
    per_token: float | None = None  # tokens to learn from for each that is judged on; None: `tokens`, whatever T is

    def __post_init__(self) -> None:
        if self.tokens < 0 or not self.rate > 0 or not (self.per_token is None or self.per_token > 0):
            raise ValueError(
                "tokens ≥ 0, rate > 0 and per_token > 0 (or null) are needed, not "
                f"{self.tokens}, {self.rate} and {self.per_token}"
            )
        if not self.inner.reads(1).tokens:
            raise ValueError(f"{type(self.inner).__name__} reads no tokens: what is learnt makes no difference to it")
        if self.inner.training(1 << 40):
            raise ValueError(f"{type(self.inner).__name__} trains already")

    def training(self, judged: int) -> int:
        return self.tokens if self.per_token is None else min(self.tokens, round(self.per_token * judged))  # (1)

    def loss(self, net: pk.Answers, allocation: pk.Allocation, batch: pk.TokenBatch) -> float:
        if count := self.training(batch.n_tokens):
            net = net.trained(allocation, batch, count, self.rate)
        return self.inner.loss(net, allocation, batch)

    def check(self, batch: pk.TokenBatch) -> None:
        self.inner.check(batch)

    def reads(self, depth: int) -> pk.Reads:
        return replace(self.inner.reads(depth), whole=True)
