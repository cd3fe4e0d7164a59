"""A file is whole or not there, and what was there before stays until then."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvswap.core.errors import ConfigError
from kvswap.core.files import whole_file


def test_what_is_written_takes_the_files_place(tmp_path: Path) -> None:
    target = tmp_path / "it"
    target.write_text("before")
    with whole_file(target, "it") as file:
        file.write_text("after")
        assert target.read_text() == "before"
    assert target.read_text() == "after"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError("no room"), ConfigError), (ZeroDivisionError("odd"), ConfigError),
     (KeyboardInterrupt(), KeyboardInterrupt), (ValueError("other"), ValueError)],
)  # fmt: skip
def test_broken_off_it_leaves_what_was_there(
    error: BaseException, raised: type[BaseException], tmp_path: Path
) -> None:
    target = tmp_path / "it"
    target.write_text("before")

    def write() -> None:
        with whole_file(target, "it", ZeroDivisionError) as file:
            file.write_text("half")
            raise error

    with pytest.raises(raised):
        write()
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]
