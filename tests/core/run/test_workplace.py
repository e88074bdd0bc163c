"""Nothing of the user's is ever lost to an output."""

import json

import pytest

from prunekit.errors import WrongInput
from prunekit.run.workplace import check_output, publish, workplace


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


def test_a_result_that_this_run_reads_is_not_overwritten(tmp_path):
    ours = result(tmp_path / "ours")
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
    assert not (tmp_path / "real.old").exists()


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
