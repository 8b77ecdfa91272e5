"""Keyed pseudonyms in place of identities: equal identity and key, equal pseudonym; without the key no way back."""

import hashlib
import hmac
import os
from pathlib import Path

_HEX_DIGITS = 20  # 80 bits: two of a million patients coincide with a probability of 4e-13
VARIABLES = _FILE, _VALUE = "RAYSEG_PSEUDONYM_KEY_FILE", "RAYSEG_PSEUDONYM_KEY"


class Pseudonyms:
    """Makes pseudonyms with one secret key, which `repr` does not show."""

    def __init__(self, key: bytes) -> None:
        """Raises ValueError for an empty key."""
        if not key:
            raise ValueError("the pseudonym key is empty: give it at least 16 random bytes")
        self._key = key

    def __repr__(self) -> str:
        return "Pseudonyms(key=...)"

    def key(self, kind: str, value: str) -> str:
        """Returns HMAC-SHA256 of a value of `kind` ("patient", "series", ...) as 20 hexadecimal digits.

        Equal values of different kinds have different pseudonyms. The value is taken as it is, leading and trailing
        spaces included.
        """
        message = f"{kind}\0{value}".encode("utf-8", "surrogatepass")
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()[:_HEX_DIGITS]

    def patient(self, patient_id: str, issuer: str = "") -> str:
        """Returns the pseudonym of a DICOM patient, by PatientID and, where it is given, IssuerOfPatientID.

        Spaces around them count for nothing (VR LO, PS3.5 section 6.2), nor does case, although it does in DICOM: a
        patient who was typed in twice would else be trained on and tested with. An ID by two issuers is of two patients
        (PS3.3 C.2.3), and so is one with an issuer beside the same one without.
        """
        # A backslash stands in no LO.
        parts = [text.strip(" \0").upper() for text in (patient_id, issuer)]
        return self.key("patient", "\\".join(parts) if parts[1] else parts[0])


def from_environment() -> Pseudonyms:
    """Reads the key from the file that RAYSEG_PSEUDONYM_KEY_FILE names, else from RAYSEG_PSEUDONYM_KEY.

    White space around the key is dropped. Raises ValueError that says what to set where neither gives a key.
    """
    advice = f"set {_FILE} to a file that holds a secret of your own (openssl rand -hex 32), the same in every run"
    path = os.environ.get(_FILE, "")
    if path:
        try:
            key = Path(path).read_bytes().strip()
        except OSError as error:
            raise ValueError(f"{_FILE} names a file that cannot be read ({type(error).__name__}): {advice}") from None
        if not key:
            raise ValueError(f"{_FILE} names an empty file: {advice}")
        return Pseudonyms(key)
    key = os.environ.get(_VALUE, "").strip().encode()
    if not key:
        raise ValueError(f"no pseudonym key: {advice}, or {_VALUE} to the secret itself")
    return Pseudonyms(key)
