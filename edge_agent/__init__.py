"""The device's half of fogline: answers here, and asks the hub for what is uncertain.

    cli.py          the command `fogline-agent`
    agent.py        the composition root: builds the parts, joins them, stops them in order
    managed.py      joins the two stories: what a hub may change on this device
    config.py       the options, validated once
    errors.py       what may go wrong, named by what the caller does next

    inference/      the story of a request
      router.py       answers with the engine, decides with policy.py
      escalation.py   asks the hub, and merges its rows
      policy.py       pure: answer here or escalate, and what that does to quality
      uplink.py       the connection to the hub: coalesces, retries, probes
      breaker.py      pure: when the hub is asked and when it is left alone
    runtime/        what runs a model, wherever it is asked from
      release.py      a release that is loaded and may be served
      variants.py     which artifact of a bundle suits this device
      engine.py       one loaded variant: arrays in, arrays out
      providers.py    what this device can really run
    update/         how a release reaches the device, and why one that works always stays
    fleet/          what the hub wants of this device, and what it learns of it

An application may run the agent inside its own process:

    async with Agent(AgentConfig(bundle=(Path("digits-1.0.0"),))) as agent:
        response = await agent.infer(InferRequest("digits", {"image": array}))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_agent.agent import Agent
    from edge_agent.config import AgentConfig
    from fogline_protocol.inference import InferRequest, InferResponse

__all__ = ["Agent", "AgentConfig", "InferRequest", "InferResponse"]

_HOMES = {
    "Agent": "edge_agent.agent",
    "AgentConfig": "edge_agent.config",
    "InferRequest": "fogline_protocol.inference",
    "InferResponse": "fogline_protocol.inference",
}


def __getattr__(name: str) -> Any:
    """Import on use, so that `fogline-agent --help` does not wait for ONNX Runtime and gRPC."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
