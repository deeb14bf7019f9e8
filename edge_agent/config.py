"""The agent's options, validated once: flags over environment over TOML file over defaults.

Every option is spelled the same way in all three: ``--deadline-s 0.5``,
``FOGLINE_AGENT_DEADLINE_S=0.5`` and ``deadline_s = 0.5``. An unknown key is an error in all
three. Nothing below the command reads the environment.
"""

import difflib
import ipaddress
import os
import re
import socket
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from edge_agent.errors import ConfigRefused
from fogline_protocol import door_memory

Transport = Literal["http2", "grpcio"]  # see ``fogline_protocol.grpc_transport``
TRANSPORTS: tuple[Transport, ...] = ("http2", "grpcio")

ENV_PREFIX = "FOGLINE_AGENT_"
OFF = "off"  # the word that closes a door: grpc = "off"
DEVICE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")  # and a model's
MAX_UNIX_PATH_BYTES = 107  # sun_path of Linux, without its final zero


def _limits(low: float, high: float) -> dict[str, tuple[float, float]]:
    return {"limits": (low, high)}


def host_device_name() -> str:
    """Return this host's name as a device name: what is not allowed becomes ``-``."""
    name = re.sub(r"[^a-z0-9_-]", "-", socket.gethostname().split(".")[0].lower()).lstrip("_-")
    return name[:63] or "device"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """What one agent is told.

    Raises:
        ConfigRefused: a value is impossible; the text names the option.
    """

    data: Path = Path("fogline-agent")  # endpoints.json, the lock; later releases and identity
    device: str = field(default_factory=host_device_name)

    grpc: str = "127.0.0.1:8101"  # beside the hub's 8001 and 8000, so both fit on one machine
    http: str = "127.0.0.1:8100"
    unix: str = OFF  # path of a Unix socket for gRPC
    door: Transport = "http2"  # what speaks gRPC: our own code, or Google's (grpcio)

    bundle: tuple[Path, ...] = ()  # releases installed by hand
    provider: str = ""  # serve on this execution provider or not at all; empty: the best one
    threads: int = field(default=0, metadata=_limits(0, 256))  # of one engine; 0: every core

    hub: str = ""  # HOST:PORT; empty: there is none
    hub_ca: Path | None = None  # PEM of the authority behind the hub's certificate
    hub_token_file: Path | None = None
    hub_root: Path | None = None  # the hub's signed TUF root; on loopback the first one is trusted
    probation_s: float = field(default=30.0, metadata=_limits(0, 86400))  # of a new release
    private: bool = False  # nothing that applications send ever leaves this device
    # MODEL or MODEL/SOURCE: what escalates of it the hub may keep to learn from; empty: nothing.
    keep: tuple[str, ...] = ()
    # Of what is answered here and may be kept: this share the hub answers, too.
    audit_rate: float = field(default=0.01, metadata=_limits(0, 1))
    allow_shared_memory: bool = False  # applications may pass tensors in /dev/shm

    deadline_s: float = field(default=2.0, metadata=_limits(0.001, 3600))  # of calls without one
    max_concurrency: int = field(default=64, metadata=_limits(1, 65536))  # beyond: Overloaded
    # Sixteen times a camera frame; a device has less memory to lose than a hub.
    max_message_bytes: int = field(default=16 << 20, metadata=_limits(1 << 16, 1 << 30))
    # That requests and unread answers take; 0: a quarter of the machine's memory.
    door_memory_bytes: int = field(default=0, metadata=_limits(0, 1 << 40))
    escalation_rows: int = field(default=32, metadata=_limits(1, 4096))  # in one request
    escalation_requests: int = field(default=4, metadata=_limits(1, 256))  # in flight at once
    telemetry_interval_s: float = field(default=1.0, metadata=_limits(0, 3600))  # 0: never
    drain_s: float = field(default=5.0, metadata=_limits(0, 600))  # for requests in flight

    def __post_init__(self) -> None:
        for option in fields(self):
            limits = option.metadata.get("limits")
            value = getattr(self, option.name)
            if limits is not None and not limits[0] <= value <= limits[1]:
                raise ConfigRefused(
                    f"{option.name}: must lie between {limits[0]} and {limits[1]}, got {value!r}"
                )
        least = door_memory.LEAST_MESSAGES * self.max_message_bytes
        if 0 < self.door_memory_bytes < least:
            raise ConfigRefused(
                f"door_memory_bytes: must hold {door_memory.LEAST_MESSAGES} requests of "
                f"max_message_bytes, which are {least} bytes, got {self.door_memory_bytes}"
            )
        if not DEVICE_NAME.fullmatch(self.device):
            raise ConfigRefused(
                f"device: a name is 1 to 63 lower-case letters, digits, '_' and '-', starting "
                f"with a letter or digit, got {self.device!r}"
            )
        if self.door not in TRANSPORTS:
            known = " or ".join(TRANSPORTS)
            raise ConfigRefused(f"door: must be {known}, got {self.door!r}")
        for door in ("grpc", "http"):
            _check_door(door, getattr(self, door))
        if self.unix != OFF and len(os.fsencode(self.unix)) > MAX_UNIX_PATH_BYTES:
            raise ConfigRefused(
                f"unix: a socket's path has at most {MAX_UNIX_PATH_BYTES} bytes, got {self.unix!r}"
            )
        for entry in self.keep:
            model, slash, source = entry.partition("/")
            if not DEVICE_NAME.fullmatch(model) or bool(slash) != bool(source):
                raise ConfigRefused(
                    f"keep: expected MODEL or MODEL/SOURCE, for example digits or digits/camera-3, "
                    f"got {entry!r}"
                )
        if self.keep and self.private:
            raise ConfigRefused("keep: this agent is private, so nothing leaves it to be kept")
        self._check_hub()

    def _check_hub(self) -> None:
        if self.hub:
            try:
                _, port = split_address(self.hub)
            except ValueError as error:
                raise ConfigRefused(f"hub: {error}") from None
            if port == 0:
                raise ConfigRefused("hub: port 0 is nobody's address; give the hub's gRPC port")
        elif self.keep:
            raise ConfigRefused("keep: there is no hub to keep anything; give hub HOST:PORT")
        for option in ("hub_ca", "hub_token_file", "hub_root"):
            path = getattr(self, option)
            if path is not None and not path.is_file():
                raise ConfigRefused(f"{option}: {path} is not a file")
            if path is not None and not self.hub:
                raise ConfigRefused(f"{option}: there is no hub to use it for; give hub HOST:PORT")
        if self.hub_token_file is not None and not self.hub_uses_tls:
            raise ConfigRefused(
                "hub_token_file: a token is sent over TLS only; give hub_ca, or leave the token "
                "out for a hub on this machine"
            )

    @property
    def hub_uses_tls(self) -> bool:
        """Whether the connection is encrypted: always, unless the hub is on this machine."""
        return bool(self.hub) and (self.hub_ca is not None or not is_loopback(self.hub))


def load(
    flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None
) -> AgentConfig:
    """Return the options in force.

    Raises:
        ConfigRefused: unreadable file, unknown key or impossible value; the text names it.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values.update(_checked(_read(file), str(file)))
    in_environment = {
        key.removeprefix(ENV_PREFIX).lower(): _from_text(key, value)
        for key, value in environment.items()
        if key.startswith(ENV_PREFIX)
    }
    values.update(_checked(in_environment, "the environment"))
    values.update(_checked(flags, "the command line"))
    return AgentConfig(**values)


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``; IPv6 hosts stand in brackets.

    Raises:
        ValueError: it is not an address.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"expected HOST:PORT, e.g. 127.0.0.1:8101, got {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(address: str) -> bool:
    """Return whether ``HOST:PORT`` is on this machine."""
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_door(door: str, address: str) -> None:
    if address == OFF:
        return
    try:
        local = is_loopback(address)
    except ValueError as error:
        raise ConfigRefused(f"{door}: {error} (port 0: any free one; {OFF}: no door)") from None
    if not local:
        raise ConfigRefused(
            f"{door}: {address!r} can be reached from other machines, and an agent serves the "
            "applications of its own device only: use 127.0.0.1, a Unix socket, or the hub's doors"
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigRefused(f"{file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigRefused(f"{file}: {error}") from None


def _checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values with the types of their options; paths and lists of them are made here."""
    known = {option.name: option.type for option in fields(AgentConfig)}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigRefused(f"unknown option {key!r} in {where}: {hint}")
        read, expected = _READERS[known[key]]
        try:
            checked[key] = read(value)
        except (TypeError, ValueError):
            raise ConfigRefused(f"{key} in {where}: expected {expected}, got {value!r}") from None
    return checked


def _from_text(key: str, value: str) -> Any:
    """Return what the text of an environment variable stands for: the option's type decides."""
    name = key.removeprefix(ENV_PREFIX).lower()
    kind = next((option.type for option in fields(AgentConfig) if option.name == name), None)
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value)
    if kind in (int, float):
        try:
            return float(value) if kind is float else int(value)
        except ValueError:
            return value
    if kind == tuple[Path, ...]:
        return [part for part in value.split(os.pathsep) if part]
    if kind == tuple[str, ...]:
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _int(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str | Path):
        raise TypeError
    return str(value)


def _path(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise TypeError
    return Path(value)


def _paths(value: object) -> tuple[Path, ...]:
    if isinstance(value, str | Path):
        return (_path(value),)
    if not isinstance(value, Sequence):
        raise TypeError
    return tuple(_path(part) for part in value)


def _texts(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Sequence):
        raise TypeError
    return tuple(_text(part) for part in value)


_READERS: Mapping[Any, tuple[Callable[[Any], Any], str]] = {
    bool: (_bool, "true or false"),
    int: (_int, "a whole number"),
    float: (_float, "a number"),
    str: (_text, "a text"),
    Transport: (_text, "a text"),
    Path: (_path, "a path"),
    Path | None: (_path, "a path"),
    tuple[Path, ...]: (_paths, "a list of paths"),
    tuple[str, ...]: (_texts, "a list of texts"),
}
