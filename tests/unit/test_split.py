"""Patients are dealt to splits by hash, and a patient in two of them is found."""

import hashlib
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayseg import config
from rayseg.data import own_split
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


def test_a_seed_may_be_a_number() -> None:
    assert Split(seed=7) == Split(seed="7")
    assert config.build(Split, {"seed": 7}) == config.build(Split, {"seed": "7"})


@pytest.mark.parametrize(
    ("val", "test", "expected"),
    [(0.2, 0.2, (9, 3, 3)), (3, 2, (10, 3, 2)), (0.25, 3, (8, 4, 3)), (0, 0.01, (14, 0, 1))],
)
def test_exact_counts_of_fifteen_patients(val: float, test: float, expected: tuple[int, int, int]) -> None:
    """By the hash, one key gave 9, 1 and 5."""
    for seed in range(20):
        split = Split(val=val, test=test, seed=seed, exact=True)
        counts = Counter(split.deal(dict.fromkeys(PATIENTS[:15], True)).values())
        assert (counts["train"], counts["val"], counts["test"]) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 900)), min_size=3, max_size=60), st.integers(0, 60))
def test_exact_counts_have_a_patient_each_and_keep_who_stood(pixels: list[tuple[int, int]], before: int) -> None:
    split = Split(val=0.15, test=0.15, exact=True)
    foreground = dict(zip(PATIENTS, pixels, strict=False))
    patients = {key: any(of) for key, of in foreground.items()}
    dealt = split.deal(patients, None, foreground)
    counts = Counter(dealt.values())
    assert counts.total() == len(patients)
    for part, share in split.parts().items():
        assert counts[part] >= 1
        assert abs(counts[part] - share * len(patients)) < 2
    assert split.deal(dict(reversed(patients.items())), None, foreground) == dealt
    standing = dict(list(dealt.items())[:before])
    added = split.deal(patients, standing, foreground)
    assert standing == {key: added[key] for key in standing}


def test_exact_counts_are_balanced_by_class_and_size() -> None:
    """Of 20 patients with one class and 20 with another, half of each large: 4 of each kind are held out of 40."""
    kinds = [(0, 10), (0, 1000), (10, 0), (1000, 0)]
    foreground = {key: kinds[number % 4] for number, key in enumerate(PATIENTS[:40])}
    for seed in range(5):
        split = Split(val=0.2, test=0.2, seed=seed, exact=True)
        dealt = split.deal(dict.fromkeys(foreground, True), None, foreground)
        for kind in kinds:
            counts = Counter(dealt[key] for key in foreground if foreground[key] == kind)
            assert abs(counts["val"] - 2) <= 1, kind
            assert abs(counts["test"] - 2) <= 1, kind
        for part in ("val", "test"):
            of_classes = Counter(foreground[key][0] > 0 for key in foreground if dealt[key] == part)
            assert of_classes == {True: 4, False: 4}


def test_folds_are_equally_large_where_counts_are_exact() -> None:
    counts = Counter(Split(test=3, folds=4, exact=True).deal(dict.fromkeys(PATIENTS[:17], True)).values())
    assert counts.pop("test") == 3
    assert sorted(counts.values()) == [3, 3, 4, 4]


def test_exact_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 patients are too few for test, val, train; lower val or test"):
        Split(exact=True).deal(dict.fromkeys(PATIENTS[:2], True))
    with pytest.raises(ValueError, match=r"split\.val: a share below 1 or a whole number"):
        Split(val=1.5, exact=True)
    with pytest.raises(ValueError, match=r"split: val and test"):
        Split(val=3)
    with pytest.raises(ValueError, match=r"split\.given: without folds"):
        Split(given="split.csv", exact=True)


def test_a_split_of_ones_own_by_patient_or_by_file() -> None:
    pseudonyms = Pseudonyms(b"a key")
    keys = [pseudonyms.patient("P1"), pseudonyms.key("patient", "p 2"), "3"]
    named, splits = own_split.read("\ufeffpatient,split\nP1,train\np 2,validation\n3,none\n".encode())
    assert named == "patient"
    assert own_split.of_patients(keys, splits, pseudonyms) == dict(zip(keys, ["train", "val", "none"], strict=True))
    assert Split(given="x").split_of("none") is None
    with pytest.raises(ValueError, match=r"1 of 4 patients are in no split, as patient 77;"):
        own_split.of_patients([*keys, "77"], splits, pseudonyms)

    named, splits = own_split.read(b"file,split\nimages/1.png,train\n2.png,test\n3.png,test\n")
    assert named == "file"
    files = [("s3://b/data/images/1.png", "a"), ("s3://b/data/images/2.png", "b"), ("s3://b/data/images/4.png", "b")]
    assert own_split.of_files(["a", "b"], files, splits) == {"a": "train", "b": "test"}
    with pytest.raises(ValueError, match="files of 1 patients are in several splits, as those of patient a"):
        own_split.of_files(["a", "b"], [*files, ("s3://b/data/images/3.png", "a")], splits)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "header patient,split or file,split"),
        ("patient,split\nDoe,trian\n", "line 2: a patient and one of train, val, test, none"),
        ("file,split\n1.png,train\n1.png,val\n", "line 3 puts a file into a second split"),
        ("patient,split\n", "no rows"),
    ],
)
def test_a_table_that_is_no_split_is_refused_without_names(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        own_split.read(text.encode())
    assert "Doe" not in str(refused.value)


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
