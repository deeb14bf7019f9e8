"""The hub's options, validated once: flags over environment over TOML file over defaults.

Every option is spelled the same way in all three: ``--max-batch 64``,
``FOGLINE_HUB_MAX_BATCH=64`` and ``max_batch = 64``. An unknown key is an error in all three.
"""

import difflib
import ipaddress
import math
import operator
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from cloud_hub.errors import ConfigRefused
from fogline_protocol import door_memory

ENV_PREFIX = "FOGLINE_HUB_"
MIN_RATE = 0.001  # requests a second of one caller: what is rarer is no rate
ENDPOINTS = "endpoints.json"  # in the data directory: where a running hub can be found


def _number(default: float, **limits: float) -> Any:
    """Return a field that is held to limits: ``least``, ``most`` or ``above``."""
    return field(default=default, metadata=limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubConfig:
    """What one hub process is told.

    Raises:
        ConfigRefused: a value is impossible, or contradicts another; the text names the option.
    """

    data: Path = Path("fogline-hub")  # database, keys, endpoints.json
    grpc: str = "127.0.0.1:8001"  # Triton's ports, so that existing clients find us
    http: str = "127.0.0.1:8000"
    door: Literal["http2", "grpcio"] = "http2"  # what speaks gRPC: our own code, or Google's
    models: Path | None = None  # a Triton-style directory: name/1/model.onnx
    model_control: Literal["none", "poll", "explicit"] = "none"  # explicit: callers load and unload
    poll_s: float = _number(5.0, above=0)  # between two looks at the directory, with poll
    allow_shared_memory: bool = False  # callers on this machine may pass tensors in /dev/shm
    trace_dir: Path | None = None  # where callers may have requests traced; None: nowhere
    mqtt: str = ""  # URL of a broker; empty: one of our own; "off": no devices to update
    name: str = "fogline-hub"  # shown in the console and in server metadata

    # Processes that speak gRPC; 0: the hub does it itself.
    front_processes: int = _number(0, least=0, most=64)

    tls_cert: Path | None = None
    tls_key: Path | None = None

    max_batch: int = _number(64, least=1, most=4096)  # rows in one run, for models that batch
    max_queue_rows: int = _number(1024, least=1)  # waiting per model; beyond it callers are refused
    threads: int = _number(0, least=0, most=256)  # of one engine; 0: as many as there are cores
    max_message_bytes: int = _number(64 << 20, least=1 << 16, most=1 << 30)
    # That requests and unread answers of all callers take, shared among the hub and its front
    # processes; 0: a quarter of the machine's memory.
    door_memory_bytes: int = _number(0, least=0)
    tensorrt: Literal["auto", "off"] = "auto"  # auto: where there is a GPU and TensorRT
    run_limit_s: float = _number(30.0, above=0)  # of one batch; then its engine is replaced
    cache_bytes: int = _number(0, least=0)  # for answers kept, of models that ask for it; 0: none
    cache_ttl_s: float = _number(300.0, above=0)  # how long an answer is kept at most
    # Of what devices let the hub keep (README, "Hard examples come back"); 0: nothing is kept.
    examples_quota_bytes: int = _number(0, least=0)  # of disk, the oldest go first
    examples_retention_days: float = _number(30.0, least=0, most=36500)  # since it came; 0: any age
    drain_notice_s: float = _number(0.2, least=0)  # not ready, still serving: load balancers notice
    drain_s: float = _number(10.0, least=0)  # then, for requests in flight; new ones are refused
    # Of one caller, unless its token says otherwise: requests a second, and at once; 0: no limit.
    caller_rate: float = _number(0.0, least=0)
    caller_concurrency: int = _number(0, least=0)
    offline_after_s: float = _number(30.0, above=0)  # silence of a device that counts as offline

    def __post_init__(self) -> None:
        for option in fields(self):
            _check_limits(option, getattr(self, option.name))
        for door in ("grpc", "http"):
            try:
                split_address(getattr(self, door))
            except ValueError as error:
                raise ConfigRefused(f"{door}: {error}") from None
        if self.mqtt not in ("", "off"):
            from fogline_protocol.mqtt import BrokerAddress  # with it comes an MQTT client

            try:
                BrokerAddress.parse(self.mqtt)
            except ValueError as error:
                raise ConfigRefused(f"mqtt: {error}") from None
        self._check_files()
        processes = 1 + self.front_processes
        least = door_memory.LEAST_MESSAGES * self.max_message_bytes * processes
        if 0 < self.door_memory_bytes < least:
            each = f" in each of {processes} processes" if self.front_processes else ""
            raise ConfigRefused(
                f"door_memory_bytes: must hold {door_memory.LEAST_MESSAGES} requests of "
                f"max_message_bytes{each}, which are {least} bytes, got {self.door_memory_bytes}"
            )
        if not math.isfinite(self.caller_rate):
            raise ConfigRefused(f"caller_rate: must be finite, got {self.caller_rate}")
        if 0 < self.caller_rate < MIN_RATE:
            raise ConfigRefused(
                f"caller_rate: 0 is no limit, otherwise it is at least {MIN_RATE}, "
                f"got {self.caller_rate}"
            )
        for door in ("grpc", "http"):
            if not is_loopback(getattr(self, door)) and self.tls_cert is None:
                raise ConfigRefused(
                    f"{door} = {getattr(self, door)!r} can be reached from other machines: that "
                    "needs --tls-cert and --tls-key, and a bearer token for every caller "
                    "(`fogline token create`); use 127.0.0.1 to stay on this machine"
                )

    def _check_files(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigRefused("tls_cert and tls_key belong together: give both or neither")
        for path in (self.tls_cert, self.tls_key):
            if path is not None and not path.is_file():
                raise ConfigRefused(f"{path} is not a file")
        for name in ("models", "trace_dir"):
            folder = getattr(self, name)
            if folder is not None and not folder.is_dir():
                raise ConfigRefused(f"{name}: {folder} is not a directory")


def load(flags: Mapping[str, Any], file: Path | None) -> HubConfig:
    """Return the options in force.

    Raises:
        ConfigRefused: unreadable file, unknown key or impossible value; the text names it.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigRefused(f"{file}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigRefused(f"{file}: {error}") from None
    values = _converted(values, str(file))
    in_environment = {
        key.removeprefix(ENV_PREFIX).lower(): value
        for key, value in os.environ.items()
        if key.startswith(ENV_PREFIX)
    }
    values.update(_converted(in_environment, "the environment"))
    values.update(_converted(flags, "the command line"))
    return HubConfig(**values)


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``; IPv6 hosts stand in brackets.

    Raises:
        ValueError: it is not an address.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(
            f"{address!r} is not HOST:PORT, e.g. 127.0.0.1:8001 (port 0: any free one)"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach ``HOST:PORT``."""
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def called_here(address: str) -> str:
    """Return ``HOST:PORT`` as this machine calls it: every address of a machine is none to call."""
    host, port = split_address(address)
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return address
    if not found.is_unspecified:
        return address
    return f"127.0.0.1:{port}" if found.version == 4 else f"[::1]:{port}"


def _check_limits(option: Field[Any], value: Any) -> None:
    # Each is asked for what is right, so that nan, of which nothing is true, is refused.
    for word, right, phrase in (
        ("above", operator.gt, "greater than"),
        ("least", operator.ge, "at least"),
        ("most", operator.le, "at most"),
    ):
        if word in option.metadata and not right(value, option.metadata[word]):
            raise ConfigRefused(
                f"{option.name}: must be {phrase} {option.metadata[word]}, got {value!r}"
            )


def _converted(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values with the types of their options; the environment knows only texts."""
    known = {option.name: option.type for option in fields(HubConfig)}
    converted: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigRefused(f"unknown option {key!r} in {where}: {hint}")
        if get_origin(known[key]) is Literal:
            choices = get_args(known[key])
            if value not in choices:
                raise ConfigRefused(f"{key}: must be {' or '.join(choices)}, got {value!r}")
            converted[key] = value
            continue
        read, expected = _READERS[known[key]]
        try:
            converted[key] = read(value)
        except (TypeError, ValueError, OverflowError):
            raise ConfigRefused(f"{key}: must be {expected}, got {value!r}") from None
    return converted


def _bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise TypeError
    words = {"true": True, "1": True, "yes": True, "on": True}
    words |= {"false": False, "0": False, "no": False, "off": False}
    try:
        return words[value.lower()]
    except KeyError:
        raise ValueError from None


def _int(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError
    return int(value)


def _float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _path(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise TypeError
    return Path(value)


_READERS: Mapping[Any, tuple[Callable[[object], Any], str]] = {
    bool: (_bool, "true or false"),
    int: (_int, "a whole number"),
    float: (_float, "a number"),
    str: (_text, "a text"),
    Path: (_path, "a path"),
    Path | None: (_path, "a path"),
}
