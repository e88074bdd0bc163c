"""Judge an allocation by how it answers the questions of a task file."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import exp, fsum, log
from typing import Literal

import torch

import prunekit as pk


@dataclass(frozen=True)
class Task(pk.Objective):
    """How likely the right answers are, against the wrong ones.

    A choice c of n_c tokens behind a prompt has the score

        s_c = Σ_t log q(c_t | prompt, c_<t) / n_c          (n_c = 1 with normalised = False)          (1)

    in nats. With r the right choice of a question, the loss is the mean over questions of

        cross-entropy    log Σ_c exp(s_c) - s_r            (2)
        margin           max_{c≠r} s_c - s_r               (3)
        likelihood       -s_r                              (4)
        accuracy         0 where s_r > s_c for all c ≠ r, else 1

    Source: the scores are those of multiple-choice evaluation, with and without normalisation. As a target accuracy
    is coarse: few questions lie near the border. Questions that are searched on say nothing in a report.
    """

    measure: Literal["cross-entropy", "margin", "likelihood", "accuracy"] = "cross-entropy"
    normalised: bool = True  # by tokens, so that long choices are not the worse for it

    def __post_init__(self) -> None:
        pk.check_choices(self)

    def loss(self, net: pk.Answers, allocation: pk.Allocation, batch: pk.TokenBatch) -> float:
        asked = batch.answers
        assert asked is not None, "check refuses other batches"
        scores = self._scores(net, allocation, batch)
        wrong, right = defaultdict[int, list[float]](list), dict[int, float]()
        for question, score, is_right in zip(asked.question.tolist(), scores, asked.right.tolist(), strict=True):
            if is_right:
                right[question] = score
            else:
                wrong[question].append(score)
        return fsum(self._lost(score, wrong[question]) for question, score in right.items()) / len(right)

    def check(self, batch: pk.TokenBatch) -> None:
        if batch.answers is None:
            raise pk.WrongInput(
                f"the objective task needs questions, and {batch.source} is running text; "
                "give a .jsonl of prompt, choices and answer as data.search_dataset"
            )
        if self.measure != "likelihood" and int(batch.answers.question.bincount().min()) < 2:
            raise pk.WrongInput(
                f"{batch.source} has questions without a wrong choice, which {self.measure} needs; "
                "add choices, or take objective.measure=likelihood"
            )

    def _scores(self, net: pk.Answers, allocation: pk.Allocation, batch: pk.TokenBatch) -> list[float]:
        assert batch.answers is not None
        found, window = list[torch.Tensor](), 0
        for ids, logits in net.logits(allocation, batch):
            here = batch.answers[slice(window, window + len(ids))]
            window += len(ids)
            log_q = logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0] - logits[:, :-1].logsumexp(-1)
            position = torch.arange(1, ids.shape[1], device=ids.device)
            first, last = here.first.to(ids.device)[:, None], here.last.to(ids.device)[:, None]
            total = torch.where((position >= first) & (position < last), log_q.double(), 0.0).sum(1)
            found.append(total / (last - first)[:, 0] if self.normalised else total)  # (1)
        return torch.cat(found).tolist()

    def _lost(self, right: float, wrong: list[float]) -> float:
        if self.measure == "cross-entropy":
            return log(1 + fsum(exp(min(score - right, 700.0)) for score in wrong))  # (2)
        if self.measure == "likelihood":
            return -right  # (4)
        margin = max(wrong) - right  # (3)
        return margin if self.measure == "margin" else float(margin >= 0)
