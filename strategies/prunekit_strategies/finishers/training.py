"""The loop that trains, for finishers that do: AdamW, a cosine, early stopping on windows that were held out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from prunekit import TokenBatch, Workpiece, WrongInput, check_choices
from prunekit.models.blocks import chunks
from prunekit.system.checkpoints import Checkpoints
from prunekit.system.progress import Stage
from prunekit_strategies.finishers.shares import Loading, Shares

WARMUP = 0.05  # share of all steps in which the rate rises to its full height
CLIP = 1.0  # norm of a gradient
BACK_OFF = 3.0  # what the rate is divided by when an epoch was undone
JUDGING = 0.1  # share of a limited time for held-out losses
STEP = 2  # a step takes at least so many times what it takes to judge its windows
LEAST_STEPS = 8  # of an epoch, when their number is given: the first ones of AdamW only find its scale
MOST_TURNS = 16  # of a batch, when the number of steps hangs on the time: it would be learnt by heart
LOGITS_AT_ONCE = 1 << 22  # values; logits are made and forgotten slice by slice, backwards too; 16 MB stay in the heap


class Course(NamedTuple):
    """What a training came to."""

    losses: list[float]  # held-out, at the start and after every epoch; none where there was no step
    steps: tuple[int, ...]  # of every epoch of `losses` that was not only a look for a rate
    epochs: int  # of the whole cosine, of which the last may be missing
    shares: Mapping[str, float] = {}  # of data sets by label, in the end, where they are weighed


@dataclass(frozen=True)
class Training:
    """How long and how boldly. The parameters end where the held-out loss was lowest: never above where it began.

    An epoch that has not lowered it is undone, and the next goes on from the lowest at a third of the rate, AdamW anew:
    a rate that is too bold for a model costs epochs, and not the recovery.

    Finishers that train have these options, with rates and epochs of their own.
    """

    trains = True

    rate: float  # of AdamW, at its height
    epochs: int
    patience: int = 3  # epochs without a lower held-out loss, one after the other, before it ends
    batch_tokens: int = 2048  # per step; whole windows, at least one
    held_out: float = 0.125  # share of the windows, the last ones
    steps: int | tuple[int, ...] | None = None  # in all, for as many epochs as have 8 each, or those of each epoch, the
    # first of `epochs`; 0: none; None: each has one on every batch

    def __post_init__(self) -> None:
        check_choices(self)
        if not (self.rate > 0 and self.epochs >= 1 and self.patience >= 1):
            raise ValueError(
                f"rate > 0, epochs ≥ 1 and patience ≥ 1 are needed, not {self.rate}, {self.epochs} and {self.patience}"
            )
        if isinstance(self.steps, tuple) and not (1 <= len(self.steps) <= self.epochs and min(self.steps) >= 1):
            raise ValueError(f"of each epoch ≥ 1 steps, for at most {self.epochs} epochs, are needed, not {self.steps}")
        if isinstance(self.steps, int) and self.steps < 0:
            raise ValueError(f"steps ≥ 0 are needed, not {self.steps}; without, every epoch takes every batch once")
        if self.batch_tokens < 1 or not 0 < self.held_out < 1:
            raise ValueError(
                f"batch_tokens ≥ 1 and 0 < held_out < 1 are needed, not {self.batch_tokens} and {self.held_out}"
            )

    def paced(self, piece: Workpiece, loss: LanguageLoss, parameters: Sequence[nn.Parameter], name: str) -> Self:
        """With as many steps as the time of `piece` allows, if there is a limit and nobody has said how many.

        A step is timed, and so is judging; windows that would take too long are not held out. No batch has more than
        `MOST_TURNS` turns. Where a step and its judging do not fit, there is none. What comes of it is saved under
        `name`: an interrupted run keeps it.
        """
        if piece.seconds is None or self.steps is not None:
            return self
        held_out(piece.tokens, self.held_out)  # refuses text of a single window
        if (saved := piece.checkpoints.load(f"{name}-pace")) is None:
            steps, held = self._afforded(piece, piece.seconds, loss, parameters)
            seconds = torch.tensor(piece.seconds, dtype=torch.float64)
            saved = {"steps": torch.tensor(steps), "held": torch.tensor(held), "seconds": seconds}
            piece.checkpoints.save(f"{name}-pace", saved)
        return replace(self, steps=int(saved["steps"]), held_out=int(saved["held"]) / len(piece.tokens))

    def deadline(self, piece: Workpiece, name: str) -> float:
        """When the time of `piece` is over, on the clock of `time.perf_counter`; a run that goes on has what it had.

        Never, where somebody has said how many steps.
        """
        if piece.seconds is None or self.steps is not None:
            return math.inf
        saved = piece.checkpoints.load(f"{name}-pace")
        return time.perf_counter() + (piece.seconds if saved is None else float(saved["seconds"]))

    def _afforded(
        self, piece: Workpiece, seconds: float, loss: LanguageLoss, parameters: Sequence[nn.Parameter]
    ) -> tuple[int, int]:
        """Steps, and windows to hold out, for so many seconds, those of finding out included."""
        begun, count = time.perf_counter(), len(piece.tokens)
        ids = next(iter(chunks(piece.tokens, self.batch_tokens)))
        if seconds <= 0:
            return 0, 1
        loss.mean([ids[:1]])  # the first time pays for what later ones find ready
        judging = _seconds(lambda: loss.mean([ids[:1]]))
        if time.perf_counter() - begun + 2 * judging + 2 * STEP * judging * len(ids) > seconds:
            return 0, 1
        step = _seconds(lambda: loss(ids).backward(inputs=list(parameters)))
        for parameter in parameters:
            parameter.grad = None
        left = seconds - (time.perf_counter() - begun)
        times = self._dealt(int(left / step)) + 1
        held = max(1, min(round(self.held_out * count), int(JUDGING * left / times / judging), count - 1))
        batches = -(-(count - held) // len(ids))
        return max(0, min(int((left - times * judging * held) / step), MOST_TURNS * batches)), held

    def _dealt(self, steps: int) -> int:
        """Epochs for a given number of steps; none without a step, which would count as one that gained nothing."""
        return min(self.epochs, max(1, steps // LEAST_STEPS), steps)

    def _planned(self, batches: int) -> tuple[list[int], int]:
        """Steps of every epoch, before the clock says anything else, and the epochs of the whole cosine."""
        if isinstance(self.steps, tuple):
            return [*self.steps], self.epochs
        if self.steps is None:
            return [batches] * self.epochs, self.epochs
        epochs = self._dealt(self.steps)
        return [self.steps * (i + 1) // epochs - self.steps * i // epochs for i in range(epochs)], epochs

    def fit(
        self,
        parameters: Sequence[nn.Parameter],
        loss: Callable[[int], Tensor],
        batches: int,
        held: Callable[[], float],
        *,
        seed: int,
        checkpoints: Checkpoints,
        name: str,
        stage: Stage,
        tries: int = 0,
        ends: float = math.inf,
    ) -> Course:
        """Lower `loss(batch)`.

        Until one has lowered it, as many as `tries` only look for a rate that does: each is the first epoch again, at a
        third of the rate.

        Batches come in a new order whenever all have had their turn, drawn from the seed. After every epoch the state
        is saved under `name`, exactly, so that a killed run ends in the same bytes: four times the parameters, once in
        the end. `ends`, on the clock of `time.perf_counter`: after every epoch, what is left of the time is dealt out
        anew to those that follow, at the pace of the last, in the place of the steps that were planned.
        """
        adam = torch.optim.AdamW(parameters, lr=self.rate, betas=(0.9, 0.95), weight_decay=0.0)
        state = _State(parameters, adam, checkpoints, name)
        history, (dealt, epochs) = state.load(), self._planned(batches)
        if not history:
            history = [_number(held())]
            state.best = [p.detach().clone() for p in parameters]
        dealt = state.dealt or dealt

        def counted() -> int:
            """Epochs so far, without those that looked for a rate."""
            return len(history) - 1 - min(tries, in_vain(history))

        stage.advance(counted())
        while (epoch := counted()) < len(dealt) and not state.done:
            begun, before, steps = time.perf_counter(), sum(dealt[:epoch]), dealt[epoch]
            rate = self.rate / BACK_OFF ** undone(history)
            for step in range(steps):
                adam.param_groups[0]["lr"] = rate * _height((epoch + (step + 0.5) / steps) / epochs)
                turn, place = divmod(before + step, batches)
                _descend(adam, parameters, loss(_order(turn, batches, seed)[place]))
            history.append(_number(held()))
            if history[-1] < min(history[:-1]):
                state.best = [p.detach().clone() for p in parameters]
            else:
                state.go_back()
            stage.advance(counted() - epoch, note=f"held-out loss {history[-1]:.4g}")
            best = history.index(min(history))
            if (len(history) - 1 - best if best else counted()) >= self.patience:
                break
            if ends < math.inf and (following := epochs - counted()):
                now = time.perf_counter()
                fits = min(int((ends - now) * steps / (now - begun)), MOST_TURNS * batches - before - steps)
                dealt[counted() :] = [fits // following] * following if fits >= following else []
            if counted() < len(dealt):
                state.dealt = dealt
                state.save(history)
        stage.advance(self.epochs - counted())
        state.dealt = dealt[: counted()]
        state.close(history)
        return Course(history, tuple(state.dealt), epochs)


@dataclass(frozen=True)
class TextTraining(Training):
    """A training of the whole model on text, of one data set or of several."""

    loading: Loading = "fixed"  # of several data sets, whether their shares move after every epoch, and by which rule

    def learn(
        self,
        piece: Workpiece,
        loss: LanguageLoss,
        parameters: Sequence[nn.Parameter],
        name: str,
        stage: Stage,
        ends: float,
    ) -> Course:
        """Lower a loss of the whole model on the text of `piece`.

        `ends`: of `deadline`, asked before the first work.
        """
        if self.steps == 0:
            stage.advance(self.epochs)
            return Course([], (), self.epochs)
        some, rest = held_out(piece.tokens, self.held_out)
        shares = Shares(
            some, rest, piece.domains, self.loading, self.epochs, self.batch_tokens, piece.checkpoints, name
        )
        shares.resume(loss.dense_mean)
        course = self.fit(
            parameters, lambda i: loss(shares.batches[i]), len(shares.batches), lambda: shares.judge(loss.mean),
            seed=piece.seed, checkpoints=piece.checkpoints, name=name, stage=stage, ends=ends,
        )  # fmt: skip
        return course._replace(shares=shares.now)


@cache
def _order(turn: int, batches: int, seed: int) -> list[int]:
    """Of the batches, when all of them have had so many turns."""
    return torch.randperm(batches, generator=torch.Generator().manual_seed(seed * 1_000_003 + turn)).tolist()


class _State:
    """All that the next step depends on, as named tensors."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], adam: torch.optim.AdamW, checkpoints: Checkpoints, name: str
    ) -> None:
        self.parameters, self.adam, self.checkpoints, self.name = parameters, adam, checkpoints, name
        self.best, self.dealt, self.done = list[Tensor](), list[int](), False

    def save(self, history: Sequence[float]) -> None:
        """After an epoch: parameters, the best of them, and what AdamW knows."""
        tensors = {f"{i}.now": parameter for i, parameter in enumerate(self.parameters)}
        for i, parameter in enumerate(self.parameters):
            tensors |= {f"{i}.{key}": value for key, value in self.adam.state[parameter].items()}
        self._write(history, tensors)

    def go_back(self) -> None:
        """To the best parameters; AdamW forgets the way it came."""
        with torch.no_grad():
            for parameter, best in zip(self.parameters, self.best, strict=True):
                parameter.copy_(best)
        self.adam.state.clear()

    def close(self, history: Sequence[float]) -> None:
        """The best parameters are the answer, and all that is remembered."""
        self.go_back()
        self._write(history, {})

    def load(self) -> list[float]:
        """The history so far; [] where nothing was saved."""
        if (tensors := self.checkpoints.load(self.name)) is None:
            return []
        self.best = [tensors[f"{i}.best"].to(p) for i, p in enumerate(self.parameters)]
        self.dealt, self.done = tensors["dealt"].tolist(), "0.now" not in tensors
        for i, parameter in enumerate([] if self.done else self.parameters):
            parameter.data.copy_(tensors[f"{i}.now"])
            if f"{i}.step" not in tensors:  # it has just gone back
                continue
            moments = {key: tensors[f"{i}.{key}"].to(parameter) for key in ("exp_avg", "exp_avg_sq")}
            self.adam.state[parameter] = moments | {"step": tensors[f"{i}.step"]}
        return tensors["history"].tolist()

    def _write(self, history: Sequence[float], tensors: Mapping[str, Tensor]) -> None:
        fixed = {"history": torch.tensor(history, dtype=torch.float64), "dealt": torch.tensor(self.dealt)}
        self.checkpoints.save(self.name, {**fixed, **{f"{i}.best": b for i, b in enumerate(self.best)}, **tensors})


def undone(history: Sequence[float]) -> int:
    """Epochs that have not lowered the held-out loss; `history` begins with the loss before the first."""
    return sum(loss >= min(history[:epoch]) for epoch, loss in enumerate(history) if epoch)


def in_vain(history: Sequence[float]) -> int:
    """Epochs before the first that has lowered the held-out loss, or all."""
    return next((epoch for epoch, loss in enumerate(history[1:]) if loss < history[0]), len(history) - 1)


def gained(piece: Workpiece, name: str, training: TextTraining, course: Course) -> dict[str, Any]:
    """What a finisher that trains the whole model has to report; said to the user, too."""
    history = course.losses
    piece.progress.say(told(name, history))
    moved = training.loading != "fixed"
    if course.shares:
        shares = ", ".join(f"{label} {share:.3f}" for label, share in course.shares.items())
        which = "these shares in the end" if moved else "the shares that the learner has come to"
        piece.progress.say(f"{name}: data sets had {which}: {shares}")
    found: dict[str, Any] = {"epochs": 0, "undone": 0}
    if history:
        found = {"held_out_loss": [history[0], min(history)], "epochs": len(history) - 1, "undone": undone(history)}
    if moved and course.shares:
        found["shares"] = dict(course.shares)
    if piece.seconds is None:
        return found
    options: dict[str, Any] = {"steps": [*course.steps] or 0, "held_out": training.held_out, "epochs": course.epochs}
    return found | {"options": options}


def told(name: str, history: Sequence[float]) -> str:
    """What training has gained, in a sentence for the user."""
    if not history:
        return f"{name}: no step was taken, so nothing was changed"
    first, best, epochs = history[0], min(history), len(history) - 1
    kept = epochs - undone(history)
    if not kept:
        return f"{name}: none of {epochs} epochs lowered the held-out loss of {first:.4g}, so nothing was changed"
    return f"{name}: the held-out loss fell from {first:.4g} to {best:.4g}; {kept} of {epochs} epochs lowered it"


@contextmanager
def holding_zeros(piece: Workpiece) -> Iterator[None]:
    """Within: what linear maps have lost of single weights gets no gradient, so that AdamW leaves it zero."""
    blocks = piece.adapter.blocks(piece.model)
    with ExitStack() as stack:
        for site in piece.sites:
            weight = None if site.form.shrinks else piece.adapter.linear(blocks[site.block], site).weight
            if weight is not None and weight.requires_grad:
                stays = weight.detach() != 0
                stack.callback(weight.register_hook(lambda gradient, stays=stays: gradient * stays).remove)
        yield


def held_out(tokens: TokenBatch, share: float) -> tuple[TokenBatch, TokenBatch]:
    """Windows to train on, and the last ones, at least one, to judge on.

    Raises:
        WrongInput: there are fewer than two windows.
    """
    if len(tokens) < 2:
        raise WrongInput(
            "training needs two windows of recovery tokens, one of them held out; give more data.recovery_tokens"
        )
    last = min(len(tokens) - 1, max(1, round(share * len(tokens))))
    first = len(tokens) - last
    return tokens.rows([*range(first)]), tokens.rows([*range(first, len(tokens))])


@dataclass(frozen=True, eq=False)
class LanguageLoss:
    """truth · next-token loss + teacher · τ² KL(dense ‖ small), nats per token, at temperature τ.

    Logits of both models live for one slice of positions at a time, in the backward pass as well.
    """

    model: Any
    dense: Any
    truth: float
    teacher: float
    temperature: float = 1.0

    def __call__(self, ids: Tensor) -> Tensor:
        """Of windows (windows, length); every position but the last predicts the next."""
        ids = ids.to(next(self.model.parameters()).device)
        hidden = self._hidden(self.model, ids)
        teacher = hidden
        if self.teacher:
            with torch.no_grad():
                teacher = self._hidden(self.dense, ids)
        targets, learning = ids[:, 1:].flatten(), torch.is_grad_enabled()
        head = [p for p in self.model.get_output_embeddings().parameters() if p.requires_grad and learning]
        return _Sliced.apply(self, hidden, teacher.detach(), targets, *head) / len(targets)  # type: ignore[no-any-return]

    @torch.no_grad()
    def mean(self, batches: Sequence[Tensor]) -> float:
        """Over windows of equal length."""
        return sum(float(self(ids)) * len(ids) for ids in batches) / sum(map(len, batches))

    def dense_mean(self, batches: Sequence[Tensor]) -> float:
        """What the dense model has, which is as near to itself as can be."""
        return replace(self, model=self.dense, teacher=0.0).mean(batches) if self.truth else 0.0

    def _hidden(self, model: Any, ids: Tensor) -> Tensor:
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)

    @property
    def rows(self) -> int:
        """Positions of a slice."""
        return max(1, LOGITS_AT_ONCE // self.model.get_output_embeddings().weight.shape[0])

    def of_slice(self, logits: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        """Summed over positions, of logits (positions, vocabulary) and the hidden states that the dense head reads."""
        loss = logits.new_zeros(())
        if self.truth:
            loss = loss + self.truth * cross_entropy(logits, targets, reduction="sum")
        if self.teacher:
            with torch.no_grad():
                wanted = _headed(self.dense, teacher).to(logits)
            small, dense = ((z / self.temperature).log_softmax(-1) for z in (logits, wanted))
            kl = kl_div(small, dense, log_target=True, reduction="sum")
            loss = loss + self.teacher * self.temperature**2 * kl
        return loss


class _Sliced(torch.autograd.Function):
    """A loss summed over slices of positions. Each is differentiated at once, so that its logits need not be kept."""

    @staticmethod
    def forward(
        ctx: Any, loss: LanguageLoss, hidden: Tensor, teacher: Tensor, targets: Tensor, *head: Tensor
    ) -> Tensor:
        """Keeps the gradients at the hidden states and at the parameters of the head, where they are asked for."""
        total, learning = hidden.new_zeros((), dtype=_precise(hidden).dtype), any(ctx.needs_input_grad)
        ahead, sums = list[Tensor](), [torch.zeros_like(parameter) for parameter in head]
        for h, t, target in zip(*(x.split(loss.rows) for x in (hidden, teacher, targets)), strict=True):
            with torch.set_grad_enabled(learning):
                state = h.detach().requires_grad_(learning)
                made = _headed(loss.model, state)
                logits = made.detach().requires_grad_(learning)
                part = loss.of_slice(logits, t, target)
            total += part.detach()
            if learning:
                (slope,) = torch.autograd.grad(part, [logits])
                ahead.append(_through_head(loss.model, state, made, slope, head, sums))
        ctx.gradients = (torch.cat(ahead), *sums) if learning else ()
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        """Backwards once: the gradients are scaled where they lie."""
        at_hidden, *at_head = (gradient.mul_(outer[0].to(gradient)) for gradient in ctx.gradients)
        return None, at_hidden, None, None, *at_head


def _through_head(
    model: Any, state: Tensor, logits: Tensor, slope: Tensor, head: Sequence[Tensor], sums: Sequence[Tensor]
) -> Tensor:
    """The gradient at hidden states, from that at their logits; those at the head's parameters are added to `sums`.

    A gradient of a vocabulary's size for every slice costs more than the products: of a linear head it is added where
    the sum lies.
    """
    module = model.get_output_embeddings()
    plain = type(module) is nn.Linear and module.bias is None and [*head] == [module.weight]
    if plain and slope.dtype == state.dtype == module.weight.dtype:
        sums[0].addmm_(slope.T, state.detach())
        return slope @ module.weight.detach()
    at_state, *at_head = torch.autograd.grad(logits, [state, *head], slope)
    for known, new in zip(sums, at_head, strict=True):
        known.add_(new)
    return at_state


def _descend(adam: torch.optim.AdamW, parameters: Sequence[nn.Parameter], loss: Tensor) -> None:
    loss.backward(inputs=list(parameters))
    nn.utils.clip_grad_norm_(parameters, CLIP)
    adam.step()
    adam.zero_grad()


def _height(share: float) -> float:
    """Of the rate at a share of all steps, never 0 in the middle of one: up in a line, down in half a cosine."""
    if share < WARMUP:
        return share / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP)))


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _number(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _headed(model: Any, hidden: Tensor) -> Tensor:
    """Logits, float32 or better; hidden states may be wider than the weights, as in Mamba."""
    head = model.get_output_embeddings()
    return _precise(head(hidden.to(head.weight.dtype)))


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
