"""Who may ask for what: bearer tokens (RFC 6750) with roles, of which the service knows the hashes only."""

import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Role = Literal["read", "submit", "admin"]  # each may do what those before it may
ROLES: tuple[Role, ...] = get_args(Role)
FILE, VALUE = "RAYSEG_TOKENS_FILE", "RAYSEG_TOKENS"

# Open without a token: what a browser and a load balancer ask for before anybody can present one, and nothing that a
# patient or a model is seen in. All else, whatever route comes to be, wants one.
PUBLIC = ("/", "/docs", "/openapi.json", "/healthz", "/readyz")
PUBLIC_FOLDERS = ("/web/", "/static-offline-docs/")
# Work that writes somewhere. Of jobs the URIs too are no reader's business.
_SUBMIT = ("/v1/jobs", "/v1/dicomweb")


@dataclass(frozen=True)
class Token:
    """One line of the tokens' file."""

    name: str  # what the audit log calls its bearer
    role: Role
    sha256: str  # hex, of the token

    def may(self, role: Role) -> bool:
        """Whether this token's role includes `role`."""
        return ROLES.index(self.role) >= ROLES.index(role)


def from_environment(environment: Mapping[str, str] = os.environ) -> tuple[Token, ...]:
    """The tokens of the file that RAYSEG_TOKENS_FILE names, else of RAYSEG_TOKENS; none where neither is set.

    Lines are `name:role:sha256`; empty ones and those after `#` are passed over.

    Raises:
        ValueError: a line is not of that form, a hash stands twice, or there is no line at all.
    """
    if path := environment.get(FILE):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{FILE} names a file that cannot be read ({type(error).__name__})") from None
        return _parse(text, FILE)
    text = environment.get(VALUE, "")
    return _parse(text, VALUE) if text.strip() else ()


def _parse(text: str, where: str) -> tuple[Token, ...]:
    tokens: list[Token] = []
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        # The line itself is not told: somebody may have put the token where its hash belongs.
        parts = re.fullmatch(r"([a-z0-9][a-z0-9_-]{0,31}):(read|submit|admin):([0-9a-f]{64})", entry)
        if not parts:
            raise ValueError(
                f"{where}, line {number}: expected name:role:sha256, a name of a-z, 0-9, - and _, a role of "
                f"{', '.join(ROLES)}, and the token's SHA-256 in 64 hexadecimal digits"
            )
        name, role, sha256 = parts[1], ROLES[ROLES.index(parts[2])], parts[3]
        if any(token.sha256 == sha256 for token in tokens):
            raise ValueError(f"{where}, line {number}: this hash stands above already; give each bearer a token")
        tokens.append(Token(name, role, sha256))
    if not tokens:
        raise ValueError(f"{where}: no token in it; a line is name:role:sha256")
    return tuple(tokens)


def bearer(tokens: Sequence[Token], authorization: str | None) -> Token | None:
    """The token of an `Authorization` header, None where it has none that is known.

    Every entry is compared, in constant time, so that the time taken tells nothing about any of them.
    """
    scheme, _, given = (authorization or "").partition(" ")
    sha256 = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).hexdigest()
    matching = None
    for token in tokens:
        if hmac.compare_digest(token.sha256, sha256):
            matching = token
    return matching if scheme.lower() == "bearer" else None


def required(method: str, path: str) -> Role | None:
    """The role that a request needs; None for what is open to all."""
    if method in {"GET", "HEAD"} and (path in PUBLIC or path.startswith(PUBLIC_FOLDERS)):
        return None
    if any(path == prefix or path.startswith(f"{prefix}/") for prefix in _SUBMIT):
        return "submit"
    return "read"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
