"""The processes of a job meet before JAX: all there, all the same, or a clear error.

The first process listens on the port that JAX's coordinator will have; each other one
tells it what it is: host, config, versions of packages and source. When all have come
(or the time is up) the first compares, has every host look at its clock and for a file
in the work directory, and tells them all what differs on which host. JAX itself would
wait for a missing host and then abort; programs that differ would hang in the middle.

Messages are lines of JSON, each way in turn: facts, question, answer, verdict.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"),
    *("libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cudnn-cu13"),
    "nvidia-nccl-cu13",
)
CLOCK = 60.0  # seconds that clocks may differ
VISIBLE = 30.0  # seconds until a file written on one host must be seen on the others
HELLO = 5.0  # seconds that one who has come may be silent
EXIT_CODE = 69  # EX_UNAVAILABLE: not a mistake, worth another start
_LONGEST = 1 << 20  # bytes of a message

Facts = dict[str, Any]


class NotMet(OSError):
    """A process of the job is late, cannot be reached or went away: it may yet come."""


def facts() -> Facts:
    """What must be the same on every host: Python, packages, the source itself."""
    found: Facts = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return found | {"source": digest.hexdigest()[:12]}


def meet(
    address: str,
    count: int,
    process: int,
    own: Mapping[str, Any],
    shared: str | Path | None = None,
    timeout: float = 300.0,
) -> None:
    """Returns once `count` processes have met at `address` (host:port) and agree.

    `own` are this process's facts; `shared` a folder that all must see. Raises
    NotMet naming who is missing or has gone, OSError where the port cannot be had, and
    ValueError, on every process, for what differs on which host.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"JAX_COORDINATOR_ADDRESS={address}: give it as host:port")
    hello = {"process": process, "count": count, "host": socket.gethostname()}
    hello |= {"facts": dict(own)}
    deadline = time.monotonic() + timeout
    if process == 0:
        verdict = _host(host, int(port), hello, shared, deadline, timeout)
    else:
        verdict = _guest(host, int(port), hello, shared, deadline, timeout)
    if verdict:
        raise ValueError(verdict)


def _host(
    host: str,
    port: int,
    hello: Facts,
    shared: str | Path | None,
    deadline: float,
    timeout: float,
) -> str:
    """The first process: the verdict, which all are told; empty if all is well."""
    count, me = hello["count"], hello["host"]
    try:
        server = socket.create_server(
            ("", port), backlog=count, **_family(), reuse_port=False
        )
    except OSError as error:
        raise OSError(
            f"process 0 cannot listen on port {port} of {me} ({error}): it is blocked "
            f"or another job has it; set JAX_COORDINATOR_ADDRESS={host}:PORT to another"
        ) from error
    guests: dict[int, _Line] = {}
    told = {0: hello}
    with contextlib.ExitStack() as stack:
        stack.enter_context(server)
        while len(told) < count:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                break
            line = stack.enter_context(_Line(connection))
            try:
                found = line.read(HELLO)
                number, name = int(found["process"]), found["host"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # somebody who is none of us
            if not 0 < number < count:
                verdict = f"process {number} on {name}: there are {count}, 0 to "
                verdict += f"{count - 1}; see what the launcher sets"
                _tell(guests | {number: line}, {"verdict": verdict, "met": True})
                return verdict
            if number in guests and guests[number].is_open():  # else started again
                verdict = f"process {number} is there twice, on {told[number]['host']} "
                verdict += f"and on {name}: end one of them"
                _tell(guests | {-1: line}, {"verdict": verdict, "met": False})
                raise NotMet(verdict)
            told[number], guests[number] = found, line
        missing = sorted(set(range(count)) - set(told))
        if missing:
            there = ", ".join(f"{n} on {told[n]['host']}" for n in sorted(told))
            verdict = (
                f"after {timeout:.0f} s process {', '.join(map(str, missing))} of "
                f"{count} is missing; there are {there}: see that every host has "
                f"started the command and reaches {host}:{port}"
            )
            _tell(guests, {"verdict": verdict, "met": False})
            raise NotMet(verdict)
        gone, problems = [], list(_differences(told))
        if not problems:
            gone, problems = _look(guests, told, shared)
        verdict = "the hosts of this job differ: " + "; ".join(problems)
        verdict = verdict if problems else "; ".join(gone)
        _tell(guests, {"verdict": verdict, "met": bool(problems) or not gone})
        for line in guests.values():  # who closes first keeps the port for a minute
            line.wait_for_end()
    if gone and not problems:
        raise NotMet(verdict)
    return verdict


def _differences(told: Mapping[int, Facts]) -> Iterator[str]:
    first = told[0]
    for number in sorted(told)[1:]:
        found = told[number]
        name = f"process {number} on {found['host']}"
        if found["count"] != first["count"]:
            yield f"{name} is one of {found['count']} processes, not {first['count']}"
        for key in sorted(set(first["facts"]) | set(found["facts"])):
            ours, theirs = first["facts"].get(key), found["facts"].get(key)
            if ours != theirs:
                yield f"{name} has {key} {theirs}, process 0 on {first['host']} {ours}"


def _look(
    guests: Mapping[int, _Line], told: Mapping[int, Facts], shared: str | Path | None
) -> tuple[list[str], list[str]]:
    """Has everyone read its clock and look for a new file in the shared folder: who
    went away, and what differs."""
    file = None
    if shared is not None:
        file = Path(shared) / f".preflight-{secrets.token_hex(8)}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    gone, problems = [], []
    try:
        _tell(guests, {"file": None if file is None else file.name})
        for number in sorted(guests):
            name = f"process {number} on {told[number]['host']}"
            try:
                answer = guests[number].read(VISIBLE + 10)
            except (OSError, ValueError):
                gone.append(f"{name} does not answer any more")
                continue
            off = answer["time"] - (time.time() - answer["looked"])
            if not gone and abs(off) > CLOCK:  # after a wait it would be that
                problems.append(f"the clock of {name} is {off:+.0f} s off")
            if not answer["seen"]:
                problems.append(
                    f"{name} does not see what is written in {shared}: it must be on "
                    "storage that all hosts share"
                )
    finally:
        if file is not None:
            file.unlink(missing_ok=True)
    return gone, problems


def _guest(
    host: str,
    port: int,
    hello: Facts,
    shared: str | Path | None,
    deadline: float,
    timeout: float,
) -> str:
    """Any other process: the verdict that it is told."""
    name = f"process {hello['process']} on {hello['host']}"
    while True:
        try:
            left = max(deadline - time.monotonic(), 0.01)
            found = socket.create_connection((host, port), min(left, 5.0))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise NotMet(
                    f"{name} cannot reach process 0 at {host}:{port} within "
                    f"{timeout:.0f} s ({error}): see that it runs, that the name "
                    "resolves and that no firewall blocks the port"
                ) from error
            time.sleep(0.2)
    try:
        with _Line(found) as line:
            line.write(hello)
            answer = line.read(timeout + 60)  # process 0 knows when the time is up
            if "verdict" not in answer:
                began = time.time()
                seen = _sees(shared, answer["file"])
                looked = time.time() - began
                line.write({"time": began, "looked": looked, "seen": seen})
                answer = line.read(VISIBLE * hello["count"] + 60)
    except (OSError, ValueError) as error:
        raise NotMet(
            f"{name}: process 0 at {host}:{port} went away before all had met ({error})"
        ) from error
    if not answer["met"]:
        raise NotMet(answer["verdict"])
    return answer["verdict"]


def _sees(shared: str | Path | None, name: str | None) -> bool:
    if shared is None or name is None:
        return True
    end = time.monotonic() + VISIBLE
    while not (Path(shared) / name).exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _family() -> dict[str, Any]:
    if not socket.has_dualstack_ipv6():
        return {}
    return {"family": socket.AF_INET6, "dualstack_ipv6": True}


def _tell(guests: Mapping[int, _Line], message: Facts) -> None:
    for line in guests.values():
        with contextlib.suppress(OSError):  # who is gone is missed elsewhere
            line.write(message)


class _Line:
    """A connection as lines of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._file = connection.makefile("rwb")

    def read(self, seconds: float) -> Facts:
        """The next message; OSError or ValueError where there is none in time."""
        self._socket.settimeout(seconds)
        data = self._file.readline(_LONGEST)
        if not data.endswith(b"\n"):
            raise OSError("the connection was closed")
        return json.loads(data)

    def write(self, message: Facts) -> None:
        self._file.write(json.dumps(message).encode() + b"\n")
        self._file.flush()

    def is_open(self) -> bool:
        try:
            self._socket.settimeout(0.05)
            return bool(self._socket.recv(1, socket.MSG_PEEK))
        except TimeoutError:
            return True
        except OSError:
            return False

    def wait_for_end(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.settimeout(5.0)
            self._file.read()

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._socket.close()
