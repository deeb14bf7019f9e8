"""The hub's options, validated once: flags over environment over TOML file over defaults.

Every option is spelled the same way in all three: ``--max-batch 64``,
``FOGLINE_HUB_MAX_BATCH=64`` and ``max_batch = 64``. An unknown key is an error in all three.
"""

import difflib
import ipaddress
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cloud_hub.errors import ConfigRefused

ENV_PREFIX = "FOGLINE_HUB_"
MIN_RATE = 0.001  # requests a second of one caller: what is rarer is no rate
ENDPOINTS = "endpoints.json"  # in the data directory: where a running hub can be found


class HubConfig(BaseModel):
    """What one hub process is told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path = Path("fogline-hub")  # database, keys, endpoints.json
    grpc: str = "127.0.0.1:8001"  # Triton's ports, so that existing clients find us
    http: str = "127.0.0.1:8000"
    door: Literal["http2", "grpcio"] = "http2"  # what speaks gRPC: our own code, or Google's
    models: Path | None = None  # a Triton-style directory: name/1/model.onnx
    model_control: Literal["none", "poll", "explicit"] = "none"  # explicit: callers load and unload
    poll_s: float = Field(5.0, gt=0)  # between two looks at the directory, with poll
    allow_shared_memory: bool = False  # callers on this machine may pass tensors in /dev/shm
    trace_dir: Path | None = None  # where callers may have requests traced; None: nowhere
    mqtt: str = ""  # URL of a broker; empty: one of our own; "off": no devices to update
    name: str = "fogline-hub"  # shown in the console and in server metadata

    front_processes: int = Field(0, ge=0, le=64)  # that speak gRPC; 0: the hub does it itself

    tls_cert: Path | None = None
    tls_key: Path | None = None

    max_batch: int = Field(64, ge=1, le=4096)  # rows in one run, for models that batch
    max_queue_rows: int = Field(1024, ge=1)  # waiting per model; beyond it callers are refused
    threads: int = Field(0, ge=0, le=256)  # of one engine; 0: as many as there are cores
    max_message_bytes: int = Field(64 << 20, ge=1 << 16, le=1 << 30)
    tensorrt: Literal["auto", "off"] = "auto"  # auto: where there is a GPU and TensorRT
    run_limit_s: float = Field(30.0, gt=0)  # of one batch; then its engine is replaced
    cache_bytes: int = Field(0, ge=0)  # for answers kept, of models that ask for it; 0: none
    cache_ttl_s: float = Field(300.0, gt=0)  # how long an answer is kept at most
    # Of what devices let the hub keep (docs in README, "Hard examples"); 0: nothing is kept.
    examples_quota_bytes: int = Field(0, ge=0)  # of disk, the oldest go first
    examples_retention_days: float = Field(30.0, ge=0, le=36500)  # since it last came; 0: any age
    drain_notice_s: float = Field(0.2, ge=0)  # not ready, still serving: load balancers notice
    drain_s: float = Field(10.0, ge=0)  # then, for requests in flight while new ones are refused
    # Of one caller, unless its token says otherwise: requests a second, and at once; 0: no limit.
    caller_rate: float = Field(0.0, ge=0, allow_inf_nan=False)
    caller_concurrency: int = Field(0, ge=0)
    offline_after_s: float = Field(30.0, gt=0)  # silence after which a device counts as offline

    @field_validator("grpc", "http")
    @classmethod
    def _an_address(cls, value: str) -> str:
        split_address(value)
        return value

    @field_validator("mqtt")
    @classmethod
    def _a_broker(cls, value: str) -> str:
        if value not in ("", "off"):
            from fogline_protocol.mqtt import BrokerAddress  # with it comes an MQTT client

            BrokerAddress.parse(value)
        return value

    @model_validator(mode="after")
    def _tls_is_whole(self) -> "HubConfig":
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: give both or neither")
        for path in (self.tls_cert, self.tls_key):
            if path is not None and not path.is_file():
                raise ValueError(f"{path} is not a file")
        if 0 < self.caller_rate < MIN_RATE:
            raise ValueError(f"caller_rate: 0 is no limit, otherwise it is at least {MIN_RATE}")
        if self.models is not None and not self.models.is_dir():
            raise ValueError(f"models: {self.models} is not a directory")
        if self.trace_dir is not None and not self.trace_dir.is_dir():
            raise ValueError(f"trace_dir: {self.trace_dir} is not a directory")
        for door in ("grpc", "http"):
            if not is_loopback(getattr(self, door)) and self.tls_cert is None:
                raise ValueError(
                    f"{door} = {getattr(self, door)!r} can be reached from other machines: that "
                    "needs --tls-cert and --tls-key, and a bearer token for every caller "
                    "(`fogline token create`); use 127.0.0.1 to stay on this machine"
                )
        return self


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
    _refuse_unknown(values, str(file))
    in_environment = {
        key.removeprefix(ENV_PREFIX).lower(): value
        for key, value in os.environ.items()
        if key.startswith(ENV_PREFIX)
    }
    _refuse_unknown(in_environment, "the environment")
    try:
        return HubConfig(**{**values, **in_environment, **flags})
    except ValidationError as error:
        raise ConfigRefused("\n".join(_sentence(e) for e in error.errors())) from None


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


def _refuse_unknown(values: Mapping[str, Any], where: str) -> None:
    known = sorted(HubConfig.model_fields)
    for key in values:
        if key not in HubConfig.model_fields:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ConfigRefused(f"unknown option {key!r} in {where}: {hint}")


def _sentence(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    text = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {text}, got {error['input']!r}" if where else text
