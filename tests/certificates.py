"""An authority of the tests' own, and a certificate that it signed, by openssl."""

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Certificates:
    """PEM files."""

    authority: Path
    certificate: Path
    key: Path


def make(folder: Path, name: str) -> Certificates:
    """For a name as openssl takes it: `IP:127.0.0.1`, `DNS:example.org`."""
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    made = Certificates(folder / "ca.pem", folder / "certificate.pem", folder / "key.pem")
    authority = ["-keyout", folder / "ca.key", "-out", made.authority, "-subj", "/CN=authority"]
    signed = ["-CA", made.authority, "-CAkey", folder / "ca.key", "-subj", "/CN=service"]
    names = ["-addext", f"subjectAltName={name}", "-addext", "basicConstraints=critical,CA:FALSE"]
    for more in (authority, [*signed, *names, "-keyout", made.key, "-out", made.certificate]):
        subprocess.run([*new, *more], check=True, capture_output=True)
    return made
