"""The reason codes: one enumeration, and one table in the README with the same meanings."""

import re
from pathlib import Path

from rayseg.records import Reason

ROOT = Path(__file__).parents[2]


def test_the_table_in_the_readme_is_the_enumeration() -> None:
    section = (ROOT / "README.md").read_text().split("## Why a slice is rejected")[1].split("\n## ")[0]
    table = re.findall(r"^\| `([a-z_]+)` \| (.+) \|$", section, re.MULTILINE)
    source = (ROOT / "platform/rayseg/records.py").read_text().split("class Reason")[1].split("\nclass ")[0]
    assert table == re.findall(r'^    [A-Z_]+ = "([a-z_]+)"  # (.+)$', source, re.MULTILINE)
    assert [code for code, _ in table] == [reason.value for reason in Reason]
