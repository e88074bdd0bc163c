"""The promises of every learner, and the claim of this one."""

import torch

from prunekit.templates.learner import Template
from prunekit.testing import LearnerSuite
from prunekit.testing.learners import Surface, lesson, mask_of, problem_of, space_of


class TestTemplate(LearnerSuite):
    plugin = Template()


def test_one_point_is_enough_for_a_quadratic_loss() -> None:
    space = space_of([3, 5], [2, 1], 0.5)
    worth = torch.tensor([3.0, 0.1, 2.0, 0.2, 2.5, 0.3, 1.9, 0.4], dtype=torch.float64)
    masks = [
        mask_of(lesson(Template(points=points), problem_of(space), Surface(worth, 2).answer).decisions[0], [3, 5])
        for points in (1, 8)
    ]
    assert torch.equal(*masks)
