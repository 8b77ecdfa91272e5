"""The table in docs/reference/interoperability.md is what other software makes of our files today."""

import shutil

import pytest

from tests.interoperability import Reader, line, rows, written


@pytest.mark.parametrize(("profile", "reader"), [pytest.param(*row, id=f"{row[0]}-{row[1].name}") for row in rows()])
def test_the_table_tells_what_readers_do(profile: str, reader: Reader) -> None:
    """Where a row differs, or a reader has another version: python -m tests.interoperability, and see what changed."""
    assert line(profile, reader) in written("files")


@pytest.mark.skipif(shutil.which("dsrdump") is None, reason="no dcmtk: apt-get install dcmtk")
def test_the_table_has_no_other_rows() -> None:
    assert len(written("files")) == len(rows())
