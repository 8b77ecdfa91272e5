"""Patients are dealt to splits by hash, and a patient in two of them is found."""

import hashlib

import pyarrow as pa
import pytest

from rayseg.data.split import Split, check_leak

PATIENTS = [f"{number:020x}" for number in range(4000)]


def table(rows: list[tuple[str | None, str | None]]) -> pa.Table:
    return pa.table({"patient_key": [row[0] for row in rows], "split": [row[1] for row in rows]})


def test_the_shares_are_as_asked() -> None:
    split = Split(val=0.2, test=0.1)
    dealt = [split.assign(patient) for patient in PATIENTS]
    # Standard deviations of the shares of 4000 draws: 0.0063 and 0.0047; four of them on either side.
    assert abs(dealt.count("val") / 4000 - 0.2) < 0.026
    assert abs(dealt.count("test") / 4000 - 0.1) < 0.019
    assert set(dealt) == {"train", "val", "test"}


def test_the_draw_is_a_hash_as_documented() -> None:
    patient = PATIENTS[5]
    position = int(hashlib.sha256(f"7:{patient}".encode()).hexdigest()[:16], 16) / 2**64
    assert Split(val=0.0, test=position + 1e-9, seed="7").assign(patient) == "test"
    assert Split(val=0.0, test=position - 1e-9, seed="7").assign(patient) == "train"


def test_a_larger_share_moves_nobody_out_of_it() -> None:
    small, large = Split(val=0.1, test=0.1), Split(val=0.1, test=0.2)
    assert all(large.assign(patient) == "test" for patient in PATIENTS if small.assign(patient) == "test")


def test_another_seed_is_another_draw() -> None:
    assert [Split(seed="1").assign(p) for p in PATIENTS] != [Split(seed="2").assign(p) for p in PATIENTS]


def test_a_share_of_nothing_gets_nobody() -> None:
    split = Split(val=0.0, test=0.0)
    assert {split.assign(patient) for patient in PATIENTS} == {"train"}
    assert split.wanted() == ("train",)
    assert Split().wanted() == ("train", "val", "test")


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.1), (0.5, 0.5), (0.1, -1)])
def test_shares_that_leave_no_training_are_refused(val: float, test: float) -> None:
    with pytest.raises(ValueError, match="split: val and test"):
        Split(val=val, test=test)


def test_a_planted_leak_is_found_and_named() -> None:
    clean = [("p1", "train"), ("p1", "train"), ("p2", "val"), ("p3", "test")]
    check_leak(table(clean))
    with pytest.raises(ValueError, match=r"1 patients .* p2;"):
        check_leak(table([*clean, ("p2", "test")]))


def test_many_leaks_are_counted_and_some_named() -> None:
    rows = [(f"p{number}", split) for number in range(9) for split in ("train", "val")]
    with pytest.raises(ValueError, match=r"9 patients .* p0, p1, p2, p3, p4 and 4 more"):
        check_leak(table(rows))


def test_rows_without_a_patient_cannot_be_checked() -> None:
    with pytest.raises(ValueError, match="without a patient_key"):
        check_leak(table([("p1", "train"), (None, "val")]))
