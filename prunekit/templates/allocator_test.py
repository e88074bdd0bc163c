"""The promises of every allocator, and the claim of this one."""

from prunekit.templates.allocator import Template
from prunekit.testing import AllocatorSuite, converse
from prunekit.testing.spaces import ZOO


class TestTemplate(AllocatorSuite):
    plugin = Template()


def test_it_never_ends_below_where_it_began() -> None:
    problem = ZOO["uneven"]()
    found = converse(Template(), problem)
    errors = [
        sum(problem.errors[i][problem.space.rungs(allocation)[i]] for i in range(len(allocation)))
        for allocation in (problem.start, found.answer)
    ]
    assert problem.space.is_feasible(found.answer)
    assert errors[1] < errors[0]
