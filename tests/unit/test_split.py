"""Patients are dealt to splits by hash, and a patient in two of them is found."""

import hashlib
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayseg.data.split import Split, check_leak, read_standing, to_csv
from rayseg.dicom.pseudonyms import Pseudonyms

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


def test_a_study_in_two_splits_is_a_leak() -> None:
    rows = table([("p1", "train"), ("p2", "val"), ("p3", "test"), ("p4", "test")])
    check_leak(rows.append_column("study_key", pa.array(["s1", "s2", None, None], pa.string())))
    with pytest.raises(ValueError, match=r"1 studies are in more than one split: s1;"):
        check_leak(rows.append_column("study_key", pa.array(["s1", "s2", "s1", "s1"])))


def test_folds_take_turns_and_leave_the_test_patients_alone() -> None:
    folds = [Split(test=0.2, folds=5, fold=fold) for fold in range(5)]
    places = [{key: split.split_of(split.assign(key)) for key in PATIENTS} for split in folds]
    assert folds[0].wanted() == ("train", "val", "test")
    for key in PATIENTS:
        seen = [place[key] for place in places]
        assert seen == ["test"] * 5 or sorted(seen) == ["train"] * 4 + ["val"]
    tested = [key for key in PATIENTS if places[0][key] == "test"]
    assert tested == [key for key in PATIENTS if Split(test=0.2, val=0.1).assign(key) == "test"]
    # 4000 * 0.16 = 640 a fold, with a standard deviation of 23
    for place in places:
        assert abs(list(place.values()).count("val") - 640) < 4 * 23


def test_each_patient_is_held_out_once_validates_once_and_else_trains() -> None:
    folds = [Split(test=0.2, folds=5, fold=fold, held_out=True) for fold in range(5)]
    assert folds[0].wanted() == ("train", "val", "test")
    for key in PATIENTS:
        seen = [split.split_of(split.assign(key)) for split in folds]
        if Split(test=0.2, val=0.1).assign(key) == "test":
            assert seen == [None] * 5, "no fold sees those who test"
        else:
            assert sorted(seen) == ["test", "train", "train", "train", "val"]  # type: ignore[type-var]
    with pytest.raises(ValueError, match="held_out: folds of 3 or more"):
        Split(folds=2, held_out=True)


@pytest.mark.parametrize("values", [{"folds": 1}, {"folds": 3, "fold": 3}, {"fold": 1}, {"fold": -1, "folds": 4}])
def test_folds_that_cannot_be_are_refused(values: dict) -> None:
    with pytest.raises(ValueError, match=r"split\.fold"):
        Split(**values)


def test_without_strata_nobody_moves_when_patients_are_added() -> None:
    for split in (Split(), Split(folds=4, fold=2)):
        few = split.deal(dict.fromkeys(PATIENTS[::3], False))
        many = split.deal(dict.fromkeys(PATIENTS, True))  # what is known of a patient does not matter either
        assert few == {key: many[key] for key in few}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(0, 60), st.sampled_from([None, 3, 5]))
def test_strata_have_their_shares_and_a_standing_patient_stays(
    positive: list[bool], before: int, folds: int | None
) -> None:
    split = Split(val=0.15, test=0.15, folds=folds, stratify=True)
    patients = dict(zip(PATIENTS, positive, strict=False))
    standing = split.deal(dict(list(patients.items())[:before]))
    fresh, added = split.deal(patients), split.deal(patients, standing)
    assert set(fresh) == set(added) == set(patients)
    assert standing == {key: added[key] for key in standing}
    assert split.deal(dict(reversed(patients.items()))) == fresh
    for stratum in (True, False):
        members = [key for key in patients if patients[key] == stratum]
        for dealt in (fresh, added):
            counts = Counter(dealt[key] for key in members)
            for part, share in split.parts().items():
                # Dealing one by one to whoever lacks most leaves nobody more than a patient and a little off.
                assert abs(counts[part] - share * len(members)) < 1.6


def test_a_standing_split_of_other_parts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"split.standing: it has the parts fold-1, this split test, val, train"):
        Split().deal({"p": True}, {"p": "fold-1"})


def test_a_standing_split_that_keeps_nobody_is_refused_and_few_are_told(caplog: pytest.LogCaptureFixture) -> None:
    ids = [f"P{number}" for number in range(40)]
    old, new = ({number: Pseudonyms(key).patient(number) for number in ids} for key in (b"old key", b"new key"))
    standing = Split().deal(dict.fromkeys(old.values(), False))
    with pytest.raises(ValueError, match=r"split\.standing: none of its 40 patients are among the 40 here.*KEY_FILE"):
        Split().deal(dict.fromkeys(new.values(), False), standing)
    few = dict.fromkeys([*list(old.values())[:19], *new.values()], False)
    kept = Split(stratify=True).deal(few, standing)
    assert "19 of its 40 patients are among the 59 here" in caplog.text
    assert all(kept[key] == standing[key] for key in few if key in standing)
    caplog.clear()
    Split().deal(dict.fromkeys([*list(old.values())[:20], *new.values()], False), standing)
    Split().deal(dict.fromkeys(new.values(), False), {})
    assert not caplog.text, "many new patients are what a standing split is for"


def test_the_table_of_patients_is_read_back() -> None:
    patients = pa.table({"patient_key": ["0123", "77e5"], "part": ["fold-0", "test"], "split": ["val", "test"]})
    assert read_standing(to_csv(patients)) == {"0123": "fold-0", "77e5": "test"}  # no number is made of a key
    for data in (b"", b"a,b\n1,2\n"):
        with pytest.raises(ValueError, match=r"not the split\.csv of a prepared set"):
            read_standing(data)
