"""Nothing of the user's is ever lost to an output."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from prunekit.errors import WrongInput
from prunekit.run.workplace import check_output, new_folder, publish, workplace


def result(folder):
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"schema": 1}))
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
    new = result(tmp_path / "new")
    (new / "fresh.txt").write_text("new")
    publish(new, tmp_path / "link")
    assert sorted(p.name for p in (tmp_path / "link").iterdir()) == ["fresh.txt", "report.json"]
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_an_unfinished_run_is_gone_on_with_also_under_overwrite(tmp_path):
    def interrupted():
        with workplace(tmp_path / "out", {"seed": 0}) as place:
            (place / "work").write_text("done")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with workplace(tmp_path / "out", {"seed": 0}, overwrite=True) as place:
        assert (place / "work").exists()
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
from prunekit.run.workplace import workplace
with workplace(Path(sys.argv[1]), {}) as place:
    (place / "work").write_text("done")
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
        assert (place / "work").read_text() == "done"


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


def complete(folder, text):
    """A result of two files in two places."""
    result(folder)
    (folder / "below").mkdir()
    (folder / "below/weights").write_text(text)
    (folder / "which").write_text(text)
    return folder


def whole(folder, text):
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} if folder.exists() else set()
    names = {"report.json", "which", "below/weights"}
    return files == names and (folder / "which").read_text() == (folder / "below/weights").read_text() == text


@pytest.mark.parametrize("leftover", [False, True])
def test_whenever_it_is_killed_the_old_or_the_new_result_is_there_whole(tmp_path, monkeypatch, leftover):
    ended, last = False, 0
    for last in range(1, 60):
        root = tmp_path / str(last)
        new, out = complete(root / "new", "new"), complete(root / "out", "old")
        if leftover:
            complete(root / ".out.replaced", "older")
        calls = iter(range(1, 1000))

        def dying(real, calls=calls, last=last):
            def call(*args, **kwargs):
                if next(calls) >= last:
                    raise Dead
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for module, name in CALLS:
                patch.setattr(module, name, dying(getattr(module, name)))
            try:
                publish(new, out)
                ended = True
            except Dead:
                pass
        assert whole(out, "new") or whole(out, "old") or whole(root / ".out.replaced", "old"), last
        if whole(root / "new", "new"):
            publish(root / "new", out)  # what the same command does in the end
        assert whole(out, "new")
        if ended:
            break
    assert ended
    assert last > 4  # it did die in between


@pytest.mark.parametrize("error", [OSError("busy"), KeyboardInterrupt()])
def test_a_rename_that_fails_leaves_the_old_result_in_its_place(tmp_path, monkeypatch, error):
    new, out = complete(tmp_path / "new", "new"), complete(tmp_path / "out", "old")
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
    assert not (tmp_path / ".out.replaced").exists()


def test_a_folder_beside_it_is_not_taken_for_an_old_result(tmp_path):
    mine = complete(tmp_path / "out.old", "mine")
    complete(tmp_path / "out", "old")
    publish(complete(tmp_path / "new", "new"), tmp_path / "out")
    assert whole(tmp_path / "out", "new")
    assert whole(mine, "mine")
    shutil.rmtree(mine)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


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
