"""The promises of every tracker, and that this one's file has what was told."""

from prunekit.templates.tracker import Lines, Template
from prunekit.testing import TrackerSuite


class TestTemplate(TrackerSuite):
    plugin = Template()

    def kept(self, track):  # type: ignore[no-untyped-def]
        assert isinstance(track, Lines)
        found: dict[str, list[tuple[int, float]]] = {}
        for line in track.file.read_text().splitlines():
            name, step, value, _ = line.split(",")
            found.setdefault(name, []).append((int(step), float(value)))
        return found
