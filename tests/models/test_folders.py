"""A folder is written whole or stays as it was."""

from pathlib import Path

import pytest

from models.folders import would_destroy, written_whole


@pytest.mark.parametrize("rename", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_the_old_folder_survives_what_stops_the_renames(
    error: type[BaseException], rename: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "weights").write_text("old")
    true, calls = Path.rename, [0]

    def stopped(self: Path, target: Path) -> Path:
        calls[0] += 1
        if calls[0] == rename:
            raise error
        return true(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(error), written_whole(folder) as new:
        (new / "weights").write_text("new")
    assert (folder / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_model_in_the_folder_would_be_destroyed(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert would_destroy(tmp_path / "a", str(tmp_path / "a"))
    assert would_destroy(tmp_path / "a", str(tmp_path / "a" / "b"))
    assert not would_destroy(tmp_path / "a" / "b", str(tmp_path / "a"))
    assert not would_destroy(tmp_path / "a", "smollm2-135m")
