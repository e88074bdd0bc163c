"""What allocators share that let the start compete with their own answers: the choice, and a line that says who won."""

from collections.abc import Sequence

from prunekit import Allocation, Problem


def best_of(name: str, problem: Problem, answers: Sequence[Allocation], losses: Sequence[float]) -> Allocation:
    """The answer of least loss, the first on a tie; where the start was among several, the journal says who won.

    Args:
        name: of the allocator, for the journal.
        problem: whose start may be among the answers.
        answers: one or more.
        losses: one for each.
    """
    best = min(range(len(answers)), key=lambda i: losses[i])
    others = [loss for answer, loss in zip(answers, losses, strict=True) if answer != problem.start]
    if others and len(others) < len(answers):
        start = losses[answers.index(problem.start)]
        pair = f"{start:.6g} against {min(others):.6g}"
        if answers[best] == problem.start:
            line = f"the start has won, its loss {pair}; with compete: false the other is taken"
        else:
            line = f"its own answer has won, the start's loss {pair}"
        problem.journal.note(f"{name}: {line}")
    elif not others:
        problem.journal.note(f"{name}: its own answer is the start")
    return answers[best]
