"""A folder that takes another's place: whichever moment a kill strikes, one of the two is there afterwards, whole."""

import shutil
from pathlib import Path

from streamtrain.atomic import recover_replaced, replace_dir


def make(folder: Path, what: str) -> Path:
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text(what)
    return folder


def read(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.iterdir())]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    make(tmp_path / "best", "old")
    for what in ("new", "newer"):
        replace_dir(make(tmp_path / ".best.part", what), tmp_path / "best")
        assert read(tmp_path / "best") == [what, what]
        assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_after_a_kill_one_of_the_two_is_there_whole(tmp_path: Path) -> None:
    """The states of the disk between the steps: the old one aside; the new one in place; the old one half removed."""
    make(tmp_path / ".best.old", "old")
    recover_replaced(tmp_path, "best")
    assert read(tmp_path / "best") == ["old", "old"]

    shutil.copytree(make(tmp_path / "new", "new"), tmp_path / "best", dirs_exist_ok=True)
    half = make(tmp_path / ".best.old", "old")
    (half / "a").unlink()
    recover_replaced(tmp_path, "best")
    assert read(tmp_path / "best") == ["new", "new"]
    assert not half.exists()


def test_what_has_another_name_stays(tmp_path: Path) -> None:
    make(tmp_path / ".worst.old", "old")
    recover_replaced(tmp_path, "best")
    assert [path.name for path in tmp_path.iterdir()] == [".worst.old"]
