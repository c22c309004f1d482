from pathlib import Path

import pytest

from tightfit.checkpoint.disk import check_free_space
from tightfit.errors import OutputError


def test_free_space_is_checked_for_paths_that_do_not_exist_yet(tmp_path: Path) -> None:
    check_free_space(tmp_path / "a" / "b", 1)
    with pytest.raises(OutputError) as e:
        check_free_space(tmp_path / "a" / "b", 2**60)
    assert str(e.value).startswith(f"{tmp_path}/a/b needs 1073741824 GiB, and its file system has")
    assert not (tmp_path / "a").exists()
