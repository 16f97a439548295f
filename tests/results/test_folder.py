import os

import pytest

from lightning_ablate.files import fresh_folder, versions, write_whole


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.txt", "one")
    write_whole(tmp_path / "a.txt", b"two")
    (tmp_path / "b").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "b", "a folder is in its place")
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.stat(tmp_path / "nothing"))
    with pytest.raises(OSError):
        write_whole(tmp_path / "a.txt", "three")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b"]
    assert (tmp_path / "a.txt").read_text() == "two"


def test_fresh_folder_never_takes_one_that_holds_a_run(tmp_path):
    assert fresh_folder(tmp_path) == tmp_path
    (tmp_path / "results.csv").touch()
    assert fresh_folder(tmp_path) == tmp_path / "run-2"
    (tmp_path / "run-2").mkdir()
    (tmp_path / "run-2" / "ablation.ckpt").touch()
    assert fresh_folder(tmp_path) == tmp_path / "run-3"


def test_versions_name_what_numbers_depend_on():
    assert {"python", "torch", "numpy", "pandas"} <= set(versions()) and all(versions().values())
