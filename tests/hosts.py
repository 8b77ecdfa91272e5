"""Hosts on one machine: namespaces with an address, a name, a disk, shared memory and processes of their own.

A network of hosts is a bridge in a namespace that joins nothing else: nothing in it reaches the real network, or is
reached from there. A host is the first process of its PID namespace and everything below it, so that killing this one
process is pulling the plug. It dies with the process that made it, and what it leaves is gone with its namespaces.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NETWORK = "10.77.0"
DISK = "/tmp/ray"  # where a host has its own files, its home and Ray's among them
_NAMESPACES = ("unshare", "-n", "-u", "-i", "-m", "-p", "-f", "--mount-proc", "--kill-child=KILL")
# Mounts are private to the host; /sys and /proc show its own processes and interfaces.
_BOOT = """
set -e
hostname {name}
mount -t tmpfs tmpfs /dev/shm
mkdir -p {disk}
mount --bind {folder} {disk}
for hidden in {hidden}; do mount -t tmpfs tmpfs $hidden; done
ip link set lo up
echo ready
exec sleep infinity
"""


def unsupported() -> str | None:
    """Why hosts cannot be made here, if so."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "unshare", "nsenter", "setpriv", "mount"):
        if shutil.which(program) is None:
            return f"the program {program} is missing (Debian: iproute2, util-linux, mount)"
    tried = "mount -t tmpfs tmpfs /dev/shm; ip link add rs0 type bridge; ip link add rs1 type veth peer name rs2"
    done = subprocess.run([*_NAMESPACES, "sh", "-e", "-c", tried], capture_output=True, text=True)
    return f"this machine forbids it ({done.stderr.strip()})" if done.returncode else None


@dataclass
class Host:
    """A host that runs; `address` is its only one beside loopback."""

    name: str
    address: str
    folder: Path  # its disk, as it is called outside
    init: subprocess.Popen[str]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        """Of its first process, as it is called outside."""
        children = Path(f"/proc/{self.init.pid}/task/{self.init.pid}/children").read_text(encoding="ascii").split()
        return int(children[0])

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line that runs `arguments` on the host."""
        return ["nsenter", "-t", str(self.pid), "-n", "-u", "-i", "-m", "-p", f"--wd={Path.cwd()}", "--", *arguments]

    def start(self, arguments: Sequence[str], environment: Mapping[str, str] = {}, **options) -> subprocess.Popen:
        """Starts a process on the host."""
        return subprocess.Popen(self.command(arguments), env={**self.environment, **environment}, text=True, **options)

    def run(
        self, arguments: Sequence[str], environment: Mapping[str, str] = {}, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the host to its end."""
        process = self.start(arguments, environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"{self.name}: {arguments} did not end in {timeout} s\n{out}\n{err}") from None
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def kill(self) -> None:
        """Ends the host as a power cut does: nothing on it runs another instruction."""
        with contextlib.suppress(ProcessLookupError, IndexError, FileNotFoundError):
            os.kill(self.pid, signal.SIGKILL)
        self.init.wait(10)


class Network:
    """A switch with hosts; the switch is a host itself, the one that the others' users sit at."""

    def __init__(self, folder: Path, hidden: Sequence[Path]) -> None:
        self._folder = folder
        self._hosts: list[Host] = []
        self.outside = self._boot("outside", 1, None, ())
        self._hidden = hidden
        self._ip("link add rs0 type bridge")
        self._ip(f"addr add {NETWORK}.1/24 dev rs0")
        self._ip("link set rs0 up")

    def host(self, name: str, number: int, disk: Path | None = None) -> Host:
        """Boots a host and plugs it in; its disk is empty, or that of a host that was killed."""
        host = self._boot(name, number, disk, self._hidden)
        self._ip(f"link add rs-{name} type veth peer name eth0 netns {host.pid}")
        self._ip(f"link set rs-{name} master rs0 up")
        _check(host.run(["ip", "addr", "add", f"{host.address}/24", "dev", "eth0"]))
        _check(host.run(["ip", "link", "set", "eth0", "up"]))
        return host

    def unplug(self, host: Host) -> None:
        """Pulls the host's network cable: who waits for it hears nothing more, not even that it is gone."""
        self._ip(f"link del rs-{host.name}")

    def close(self) -> None:
        """Ends all hosts."""
        for host in reversed(self._hosts):
            host.kill()

    def _boot(self, name: str, number: int, disk: Path | None, hidden: Sequence[Path]) -> Host:
        folder = disk or self._folder / f"{name}-{len(self._hosts)}"
        folder.mkdir(parents=True, exist_ok=True)
        boot = _BOOT.format(name=name, folder=folder, disk=DISK, hidden=" ".join(map(shlex.quote, map(str, hidden))))
        init = subprocess.Popen(
            # Dies with us, and its children, the whole host, with it.
            ["setpriv", "--pdeathsig", "KILL", *_NAMESPACES, "sh", "-c", boot],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # of unshare, about its end
            text=True,
            start_new_session=True,
        )  # fmt: skip
        assert init.stdout is not None
        assert init.stdout.readline() == "ready\n", f"the host {name} does not boot"
        host = Host(
            name, f"{NETWORK}.{number}", folder, init, {"PATH": os.environ["PATH"], "HOME": DISK, "TMPDIR": DISK}
        )
        self._hosts.append(host)
        return host

    def _ip(self, arguments: str) -> None:
        # Only the network is entered: process ids are those of here.
        command = ["nsenter", "-t", str(self.outside.pid), "-n", "--", "ip", *arguments.split()]
        _check(subprocess.run(command, capture_output=True, text=True))


def _check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, f"{done.args}: {done.stderr}"


@contextlib.contextmanager
def network(folder: Path, hidden: Sequence[Path] = ()) -> Iterator[Network]:
    """A network without hosts, whose disks are in `folder` and see `hidden` empty; all are ended with the block."""
    made = Network(folder, hidden)
    try:
        yield made
    finally:
        made.close()
