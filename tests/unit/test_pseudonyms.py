"""Pseudonyms: by the definition of HMAC, and a key that is asked for in words that help."""

from pathlib import Path

import pytest

from rayseg.dicom.pseudonyms import Pseudonyms, from_environment


def test_is_hmac_sha256_as_openssl_computes_it() -> None:
    # printf 'patient\0P1' | openssl dgst -sha256 -hmac secret
    assert Pseudonyms(b"secret").key("patient", "P1") == "5134ea501bcd6797f8c3"


def test_depends_on_key_kind_and_value() -> None:
    first = Pseudonyms(b"one")
    keys = {first.key("patient", "1"), first.key("series", "1"), first.key("patient", "2"), first.key("patient1", "")}
    keys.add(Pseudonyms(b"two").key("patient", "1"))
    assert len(keys) == 5
    assert first.key("patient", "Müller") == Pseudonyms(b"one").key("patient", "Müller")


def test_repr_hides_the_key() -> None:
    assert "hidden" not in repr(Pseudonyms(b"hidden"))


def test_key_from_file_or_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Pseudonyms(b"secret").key("patient", "P1")
    monkeypatch.setenv("RAYSEG_PSEUDONYM_KEY", " secret\n")
    monkeypatch.delenv("RAYSEG_PSEUDONYM_KEY_FILE", raising=False)
    assert from_environment().key("patient", "P1") == expected
    (tmp_path / "key").write_bytes(b"secret\n")
    monkeypatch.setenv("RAYSEG_PSEUDONYM_KEY_FILE", str(tmp_path / "key"))
    monkeypatch.setenv("RAYSEG_PSEUDONYM_KEY", "another")
    assert from_environment().key("patient", "P1") == expected


@pytest.mark.parametrize("content", [None, b" \n"])
def test_missing_key_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    monkeypatch.setenv("RAYSEG_PSEUDONYM_KEY", "")
    monkeypatch.setenv("RAYSEG_PSEUDONYM_KEY_FILE", "")
    with pytest.raises(ValueError, match=r"RAYSEG_PSEUDONYM_KEY_FILE.*openssl rand"):
        from_environment()
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    monkeypatch.setenv("RAYSEG_PSEUDONYM_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(ValueError, match=r"RAYSEG_PSEUDONYM_KEY_FILE names .*openssl rand"):
        from_environment()
    with pytest.raises(ValueError, match="empty"):
        Pseudonyms(b"")


def test_a_patient_is_an_id_without_its_spaces_and_case_of_one_issuer() -> None:
    key = Pseudonyms(b"one").patient
    assert (
        key("ab12") == key("AB12 ") == key("  Ab12\0") == key("AB12", "  ") == Pseudonyms(b"one").key("patient", "AB12")
    )
    assert key("straße", "spital") == key("STRASSE ", " SPITAL ")
    several = [
        key("AB12"), key("AB12", "A"), key("AB12", "B"), key("AB1", "2"), key("AB 12"), key("AB120"),
        key("AB12", "AB12"),
    ]  # fmt: skip
    assert len(set(several)) == len(several)
