"""Nothing of the user's is ever lost to an output."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress

import pytest

from prunekit.errors import WrongInput
from prunekit.run.workplace import check_output, new_folder, publish, published, workplace
from prunekit.system.files import changed, seal


def result(folder):
    folder.mkdir(parents=True)
    for name in ("report.json", "recipe.yaml", "ledger.jsonl"):
        (folder / name).write_text(json.dumps({"schema": 1}))
    seal(folder)
    return folder


def test_only_a_result_is_overwritten(tmp_path):
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    (project / "recipe.yaml").write_text("sparsity: 0.5")
    with pytest.raises(WrongInput, match="no result of prunekit"):
        check_output(project, overwrite=True)
    check_output(result(tmp_path / "ours"), overwrite=True)
    with pytest.raises(WrongInput, match="not empty"):
        check_output(tmp_path / "ours", overwrite=False)


def test_a_result_that_this_run_reads_or_is_in_is_not_overwritten(tmp_path, monkeypatch):
    ours = result(tmp_path / "ours")
    with monkeypatch.context() as patch:
        patch.chdir(ours)
        with pytest.raises(WrongInput, match="ours, which this run needs"):
            check_output(ours, overwrite=True)
    with pytest.raises(WrongInput, match="which this run needs"):
        check_output(ours, overwrite=True, sources=[ours / "text.txt"])


def test_a_folder_with_the_name_of_the_workplace_is_left_alone(tmp_path):
    theirs = tmp_path / "mine.partial"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    with pytest.raises(WrongInput, match="holds other files"), workplace(tmp_path / "mine", {}, overwrite=True):
        pass
    assert (theirs / "thesis.txt").exists()


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/xx/yy"])
def test_a_place_that_cannot_be_made_is_refused_before_any_work(tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(WrongInput):
        check_output(tmp_path / where, overwrite=False)


def test_a_link_is_followed_and_an_old_result_replaced_whole(tmp_path):
    (tmp_path / "link").symlink_to(result(tmp_path / "real"))
    (tmp_path / "real" / "stale.txt").write_text("old")
    seal(tmp_path / "real")
    new = result(tmp_path / "work" / "new")
    (new / "fresh.txt").write_text("new")
    publish(new, tmp_path / "link")
    assert (tmp_path / "link/fresh.txt").exists()
    assert not (tmp_path / "link/stale.txt").exists()
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real", "work"]
    assert not any((tmp_path / "work").iterdir())


def test_an_unfinished_run_is_gone_on_with_also_under_overwrite(tmp_path):
    def interrupted():
        with workplace(tmp_path / "out", {"seed": 0}) as place:
            (place / "base.json").write_text("done")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with workplace(tmp_path / "out", {"seed": 0}, overwrite=True) as place:
        assert (place / "base.json").exists()
    assert not place.exists()


def test_a_finished_place_is_gone(tmp_path):
    with workplace(tmp_path / "out", {}) as place:
        assert place.is_dir()
    assert not place.exists()
    with workplace(None, {}) as place:
        assert place.is_dir()
    assert not place.exists()


# -- one process at a time ------------------------------------------------------------------------------

HOLDS = """
import sys, time
from pathlib import Path
from prunekit.system.files import changed, seal
from prunekit.run.workplace import workplace
with workplace(Path(sys.argv[1]), {}) as place:
    (place / "base.json").write_text("done")
    print("here", flush=True)
    time.sleep(600)
"""


def test_another_process_is_refused_until_this_one_has_ended_even_by_kill(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == b"here\n"
        sentence = r"another process works on .*out\.partial; wait for it or choose another --output"
        with pytest.raises(WrongInput, match=sentence), workplace(tmp_path / "out", {}):
            pass
        holder.send_signal(signal.SIGKILL)
    with workplace(tmp_path / "out", {}) as place:
        assert (place / "base.json").read_text() == "done"


def test_a_refused_run_does_not_keep_the_place(tmp_path):
    with workplace(tmp_path / "out", {"seed": 0}) as place:
        with pytest.raises(WrongInput, match="another process"), workplace(tmp_path / "out", {"seed": 0}):
            pass
        assert place.exists()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/x").write_text("")
    with pytest.raises(WrongInput, match="holds other files"), workplace(tmp_path / "out", {}):
        pass
    (tmp_path / "out.partial/x").unlink()
    with workplace(tmp_path / "out", {}):
        pass


# -- replacing a result ---------------------------------------------------------------------------------


class Dead(BaseException):
    """The process was killed: nothing of it runs any more."""


CALLS = [(os, "replace"), (os, "rename"), (os, "rmdir"), (os, "unlink"), (os, "scandir")]


@contextmanager
def dead_from(last, monkeypatch, names):
    """The process is killed at the call number `last` of any of some functions, and stays dead."""
    calls = iter(range(1, 1000))

    def dying(real):
        def call(*args, **kwargs):
            if next(calls) >= last:
                raise Dead
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for module, name in names:
            patch.setattr(module, name, dying(getattr(module, name)))
        yield


def complete(folder, text):
    """A result of two files in two places."""
    result(folder)
    (folder / "below").mkdir()
    (folder / "below/weights").write_text(text)
    (folder / "which").write_text(text)
    seal(folder)
    return folder


def whole(folder, text):
    return folder.exists() and not changed(folder) and (folder / "which").read_text() == text


@pytest.mark.parametrize("leftover", [False, True])
def test_whenever_it_is_killed_the_old_or_the_new_result_is_there_whole(tmp_path, monkeypatch, leftover):
    ended, last = False, 0
    for last in range(1, 60):
        root = tmp_path / str(last)
        new, out = complete(root / "work/new", "new"), complete(root / "out", "old")
        if leftover:
            complete(root / "work/replaced", "older")
        with dead_from(last, monkeypatch, CALLS):
            try:
                publish(new, out)
                ended = True
            except Dead:
                pass
        assert whole(out, "new") or whole(out, "old") or whole(root / "work/replaced", "old"), last
        if (root / "work/new").exists():
            publish(root / "work/new", out)  # what the same command does in the end
        assert whole(out, "new")
        if ended:
            break
    assert ended
    assert last > 4  # it did die in between


@pytest.mark.parametrize("error", [OSError("busy"), KeyboardInterrupt()])
def test_a_rename_that_fails_leaves_the_old_result_in_its_place(tmp_path, monkeypatch, error):
    new, out = complete(tmp_path / "work/new", "new"), complete(tmp_path / "out", "old")
    real = os.replace

    def failing(source, target):
        if os.fspath(source) == str(new):
            raise error
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        patch.setattr(os, "rename", failing)
        with pytest.raises(type(error)):
            publish(new, out)
    assert whole(out, "old")
    assert whole(new, "new")
    assert not (tmp_path / "work/replaced").exists()


@pytest.mark.parametrize("name", ["out.old", ".out.replaced", "replaced", ".out.writing"])
@pytest.mark.parametrize("is_file", [False, True])
def test_what_stands_beside_it_is_not_taken_for_an_old_result(tmp_path, name, is_file):
    mine = tmp_path / name
    if is_file:
        mine.write_text("mine")
    else:
        complete(mine, "mine")
    complete(tmp_path / "out", "old")
    with workplace(tmp_path / "out", {"seed": 0}, overwrite=True) as place:
        publish(complete(place / "result", "new"), tmp_path / "out")
    assert whole(tmp_path / "out", "new")
    assert mine.read_text() == "mine" if is_file else whole(mine, "mine")
    assert {p.name for p in tmp_path.iterdir()} == {"out", name}


def test_a_result_in_which_the_user_keeps_something_is_not_replaced(tmp_path):
    (complete(tmp_path / "out", "old") / "below/thesis.txt").write_text("years of work")
    with pytest.raises(WrongInput, match=r"holds below/thesis\.txt, which prunekit has not made"):
        check_output(tmp_path / "out", overwrite=True)


def test_what_a_user_has_put_in_the_place_of_the_output_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "half"

    def run(overwrite=False, mine=None):
        with workplace(out, {}, overwrite=overwrite) as place:
            if not (place / "result").exists():
                complete(place / "result", "new")
            if mine is not None:
                mine()
            publish(place / "result", out, overwrite=overwrite)

    with pytest.raises(WrongInput, match="half exists and is not empty"):
        run(mine=lambda: complete(out, "copied here"))
    assert whole(out, "copied here")
    with pytest.raises(WrongInput, match=r"holds thesis\.txt"):
        run(overwrite=True, mine=lambda: (out / "thesis.txt").write_text("years of work"))
    (out / "thesis.txt").unlink()
    run(overwrite=True)
    assert whole(out, "new")


@pytest.mark.parametrize("files", [{"report.json"}, {"report.json", "recipe.yaml", "ledger.jsonl"}, {"pareto.json"}])
def test_a_folder_that_looks_like_a_result_but_does_not_say_so_is_left_alone(tmp_path, files):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in files:
        (theirs / name).write_text(json.dumps({"schema": 1}))
    for marker in (None, "[]", '{"made by": "somebody", "files": {}}', '{"made by": "prunekit", "files": {}}', "["):
        if marker is not None:
            (theirs / "files.json").write_text(marker)
        with pytest.raises(WrongInput, match="no result of prunekit"):
            check_output(theirs, overwrite=True)


def test_a_place_of_another_kind_is_refused_before_any_work(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in (tmp_path / "loop", tmp_path / ("x" * 250), tmp_path / ("x" * 300)):
        with pytest.raises(WrongInput, match="cannot be made"):
            check_output(place, overwrite=False)
    with pytest.raises(WrongInput, match="is not UTF-8; rename it"):
        check_output(tmp_path / os.fsdecode(b"caf\xe9"), overwrite=False)
    (tmp_path / "out.partial").write_text("")
    with pytest.raises(WrongInput, match="is a file"):
        check_output(tmp_path / "out", overwrite=False)


@pytest.mark.parametrize(
    "name",
    [
        *("thesis.txt", "walks/notes.txt", "walk-1f/mine.md", "0.5/notes.txt", "study/best.yaml"),
        *("result/notes.txt", "result/0.5/eval.json", "0.5/written/below/config.json", "teacher/notes.txt"),
    ],
)
def test_what_lies_in_a_working_folder_and_no_run_has_made_is_not_removed(tmp_path, name):
    place, out = tmp_path / "out.partial", tmp_path / "out"
    with suppress(RuntimeError), workplace(out, {"seed": 0}):
        for own in (
            "ledger.jsonl",
            "walk-1f/layer.0.safetensors",
            "walk-1f/.manifest.json",
            "0.5/teacher/0.safetensors",
            "result/0.5/model-00001-of-00002.safetensors",
            "result/0.5/LICENSE",
            "result/additional_chat_templates/tool.jinja",
            "0.5/written/.report.json",
        ):
            (place / own).parent.mkdir(parents=True, exist_ok=True)
            (place / own).touch()
        raise RuntimeError("stopped")
    (place / name).parent.mkdir(exist_ok=True)
    (place / name).write_text("years of work")
    before = sorted(place.rglob("*"))
    sentence = rf"out\.partial holds {name}, which prunekit has not made; move it"
    with pytest.raises(WrongInput, match=sentence), workplace(out, {"seed": 1}, overwrite=True):
        pass
    assert sorted(place.rglob("*")) == before
    with workplace(out, {"seed": 0}):  # its own command goes on, and leaves what is not its own
        pass
    assert [path for path in place.rglob("*") if path.is_file()] == [place / name]


# -- stopped at any moment ------------------------------------------------------------------------------


@pytest.mark.slow
def test_wherever_it_is_stopped_the_same_command_goes_on(tmp_path, monkeypatch):
    """Making the place, discarding another's, publishing and tidying up: stopped before every change of a file."""
    ended, last = False, 0
    for last in range(1, 200):
        out = tmp_path / str(last) / "out"
        complete(out, "old")
        with suppress(KeyboardInterrupt), workplace(out, {"seed": 1}, overwrite=True) as place:
            (place / "walk-0").mkdir()
            (place / "walk-0/other.json").write_text("another run's")
            raise KeyboardInterrupt

        def run(out=out):
            check_output(out, overwrite=True)
            with workplace(out, {"seed": 0}, overwrite=True) as place:
                if not published(place, out):
                    assert not (place / "walk-0").exists()
                    (place / "base.json").write_text("half")
                    shutil.rmtree(place / "result", ignore_errors=True)
                    publish(complete(place / "result", "new"), out)

        with dead_from(last, monkeypatch, [*CALLS, (os, "mkdir")]):
            try:
                run()
                ended = True
            except Dead:
                pass
        run()
        assert whole(out, "new"), last
        assert [path.name for path in out.parent.iterdir()] == ["out"], last
        if ended:
            break
    assert ended
    assert last > 20


def test_a_damaged_card_is_one_sentence_and_can_be_discarded(tmp_path):
    with pytest.raises(RuntimeError), workplace(tmp_path / "out", {"seed": 0}) as place:
        raise RuntimeError("stopped")
    for content in ("[", "[]", '{"sha256": 1}', "\x00" * 100, "[" * 100_000):
        (place / "run.json").write_text(content)
        with pytest.raises(WrongInput, match=r"run.json is damaged; .*--overwrite"), workplace(tmp_path / "out", {}):
            pass
    with workplace(tmp_path / "out", {}, overwrite=True) as place:
        assert place.exists()
    assert not place.exists()


def test_a_folder_that_cannot_be_filled_leaves_what_was_there(tmp_path):
    theirs = tmp_path / ".out.writing"
    theirs.mkdir()
    (theirs / "notes").touch()
    with pytest.raises(OSError, match="full"), new_folder(tmp_path / "out"):
        raise OSError("full")
    assert [path.name for path in tmp_path.iterdir()] == [".out.writing"]
    with new_folder(tmp_path / "out") as folder:
        (folder / "weights").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.writing", "out"]
    assert (theirs / "notes").exists()
