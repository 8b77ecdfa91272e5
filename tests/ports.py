"""Ports on loopback for what the tests start as processes of their own."""

import random
import socket
from contextlib import ExitStack

# Above what Ray's workers take (10002 to 19999), below what Linux gives to whoever names none (32768 and up): between
# the asking here and the listening there seconds pass, in which a Ray node alone takes dozens of the latter.
RANGE = range(20_000, 32_768)


def free_ports(count: int) -> list[int]:
    """As many different ones, on which nobody listens now."""
    ports: list[int] = []
    with ExitStack() as held:
        while len(ports) < count:
            port = random.SystemRandom().choice(RANGE)
            try:
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
    return ports


def free_port() -> int:
    return free_ports(1)[0]
