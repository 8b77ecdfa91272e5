"""The reason codes: one enumeration, and the same codes and meanings on the page that is generated from it."""

import re
from pathlib import Path

from rayseg.records import Reason
from tests.unit.documentation import generated

ROOT = Path(__file__).parents[2]


def test_the_table_of_the_documentation_is_the_enumeration() -> None:
    assert "<!-- generated: codes rayseg.records Reason -->" in (ROOT / "docs/reference/reasons.md").read_text()
    table = re.findall(r"^\| `([a-z_]+)` \| (.+) \|$", generated("codes rayseg.records Reason"), re.MULTILINE)
    source = (ROOT / "platform/rayseg/records.py").read_text().split("class Reason")[1].split("\nclass ")[0]
    assert table == re.findall(r'^    [A-Z_]+ = "([a-z_]+)"  # (.+)$', source, re.MULTILINE)
    assert [code for code, _ in table] == [reason.value for reason in Reason]
