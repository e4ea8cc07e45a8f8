"""The processes of a run meet before JAX connects them, so that what is wrong is said to all of them, and in time.

JAX ends a process in which it cannot connect, without saying who is missing. So process 0 listens on the coordinator's
port first, each other process says who it is in one line of JSON and is told in one line that all is well, or what is
not; then the port is JAX's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import select
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ffjax.errors import DistributedError

_LINGER_S = 3.0
"""Once something is wrong, process 0 waits so long for others to tell them too."""
_RETRY_S = 0.1
_HELLO_S = 5.0
"""A connection that says nothing for so long is none of ours."""
_GREETING = b'{"ffjax": "coordinator"}\n'
_MOST_BYTES = 1 << 20
_MOST_NAMED = 8
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A process of a run, as it describes itself."""

    process_id: int
    processes: int
    """How many it takes part in a run of."""
    host: str
    versions: Mapping[str, str]
    """Of the packages that have to be the same everywhere."""

    def __str__(self) -> str:
        return f"process {self.process_id} (on {self.host})"


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[::1]:port`; raises DistributedError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise DistributedError(f"coordinator={address!r} is no address. Remedy: host:port, such as node-0:29400.")
    return host.strip("[]"), int(port)


def meet(address: str, me: Member, *, timeout_s: float) -> None:
    """Returns once all processes have come to process 0's address and are alike.

    Raises DistributedError, the same in all who came: who is missing after `timeout_s`, who came twice, who differs in
    what. Also where the port is in use, or nobody answers.
    """
    if not 0 <= me.process_id < me.processes:
        raise DistributedError(
            f"process {me.process_id} of {me.processes}: ids count from 0. Remedy: an id from 0 to {me.processes - 1}."
        )
    if me.process_id == 0:
        _host(address, me, timeout_s)
    else:
        _join(address, me, timeout_s)


def faults(members: Sequence[Member]) -> str:
    """What is wrong with those who came, process 0 first; empty if nothing is (some may be missing)."""
    first, *others = members
    seen = {first.process_id: first}
    wrong = []
    for member in others:
        if member.processes != first.processes:
            wrong.append(f"{member} was started as one of {member.processes}, {first} as one of {first.processes}")
        elif member.process_id in seen:
            hosts = f"on {seen[member.process_id].host} and on {member.host}"
            wrong.append(f"two came as process {member.process_id}: {hosts}")
        seen.setdefault(member.process_id, member)
        wrong += [
            f"{member} has {name} {member.versions.get(name, 'not')}, {first} has {version}"
            for name, version in first.versions.items()
            if member.versions.get(name, "not") != version
        ]
    if not wrong:
        return ""
    more = f"; and {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
    return (
        f"the processes of this run differ: {'; '.join(wrong[:_MOST_NAMED])}{more}. Remedy: start all alike, each with "
        "an id of its own, the same number of processes and the same packages."
    )


# -- process 0


def _host(address: str, me: Member, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    came: list[tuple[Member, socket.socket]] = []
    with contextlib.ExitStack() as sockets:
        with _listener(address) as listener:
            wrong = ""
            while len(came) < me.processes - 1 or wrong:
                listener.settimeout(max(0.0, deadline - time.monotonic()) or 1e-3)
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    break
                sockets.enter_context(connection)
                if (member := _hello(connection)) is None:
                    continue
                # One that was started again comes again.
                came = [(m, c) for m, c in came if _is_there(c)] + [(member, connection)]
                if not wrong and (wrong := faults([me, *(m for m, _ in came)])):
                    deadline = min(deadline, time.monotonic() + _LINGER_S)
        # The port is free again: what follows is told to those who came.
        members = [me, *(member for member, connection in came if _is_there(connection))]
        wrong = faults([me, *(m for m, _ in came)]) or _missing(members, address, timeout_s)
        for _, connection in came:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps({"error": wrong}).encode() + b"\n")
    if wrong:
        raise DistributedError(wrong)


def _missing(members: Sequence[Member], address: str, timeout_s: float) -> str:
    absent = sorted(set(range(members[0].processes)) - {m.process_id for m in members})
    if not absent:
        return ""
    named = ", ".join(map(str, absent[:_MOST_NAMED])) + (", ..." if len(absent) > _MOST_NAMED else "")
    return (
        f"of {members[0].processes} processes {len(members)} came to {address} within {timeout_s:g} s; missing: "
        f"{named}. Remedy: see why {'it' if len(absent) == 1 else 'they'} did not start, or start with the number of "
        "processes that there is; a longer timeout if hosts start late."
    )


def _listener(address: str) -> socket.socket:
    host, port = split_address(address)
    try:
        if host in LOOPBACK:
            family = socket.AF_INET6 if host == "::1" else socket.AF_INET
            return socket.create_server((host, port), family=family)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise DistributedError(
                f"port {port} of this host, which is to coordinate the run ({address}), is in use. Remedy: another "
                "port, or end what listens there (an earlier run?)."
            ) from error
        raise DistributedError(
            f"cannot listen at {address}: {error.strerror}. Remedy: an address of process 0's host and a port above "
            "1023."
        ) from error


def _hello(connection: socket.socket) -> Member | None:
    """Who a connection is from; None for what is no process of a run."""
    connection.settimeout(_HELLO_S)
    try:
        connection.sendall(_GREETING)
        content = json.loads(_line(connection))
        return Member(
            process_id=int(content["process_id"]),
            processes=int(content["processes"]),
            host=str(content["host"]),
            versions={str(k): str(v) for k, v in content["versions"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_there(connection: socket.socket) -> bool:
    """Whether the other side, which only waits, has not gone: nothing to read, not even an end."""
    return not select.select([connection], [], [], 0)[0]


# -- the others


def _join(address: str, me: Member, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    answered = "nothing answers there"
    for connection in _attempts(address, deadline):
        with connection:
            try:
                connection.settimeout(max(_RETRY_S, deadline - time.monotonic()))
                if _line(connection) != _GREETING:
                    raise ValueError("not ours")
                connection.sendall(json.dumps(dataclasses.asdict(me)).encode() + b"\n")
                # Process 0 has its say after its own timeout, which may have begun later.
                connection.settimeout(max(0.0, deadline - time.monotonic()) + timeout_s)
                wrong = json.loads(_line(connection))["error"]
            except (OSError, ValueError, KeyError, TypeError):
                answered = "what answers there is no coordinator of this run, or ended before all had come"
                continue
        if wrong:
            raise DistributedError(str(wrong))
        for again in _attempts(address, deadline):  # JAX's own coordinator
            again.close()
            return
    raise DistributedError(
        f"{me} did not reach the coordinator at {address} within {timeout_s:g} s: {answered}. Remedy: check the "
        "address and that process 0 runs there; a firewall must let its port through."
    )


def _attempts(address: str, deadline: float) -> Iterator[socket.socket]:
    """Connections to an address, one after another until the deadline; none while nobody listens."""
    host, port = split_address(address)
    while (left_s := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError):  # a name that is not known yet too: hosts come up in any order
            connection = socket.create_connection((host, port), timeout=left_s)
            # A free port above 32767 can be given to the very socket that connects to it.
            if connection.getsockname() != connection.getpeername():
                yield connection
            else:
                connection.close()
        time.sleep(_RETRY_S)


def _line(connection: socket.socket) -> bytes:
    """Up to the end of a line; raises ValueError where the other side ends before, or says too much."""
    data = b""
    while not data.endswith(b"\n"):
        part = connection.recv(65536)
        data += part
        if not part or len(data) > _MOST_BYTES:
            raise ValueError("no line")
    return data
