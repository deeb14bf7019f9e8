from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cloud_hub.config import HubConfig
from cloud_hub.hub import Hub
from edge_agent import Agent, AgentConfig
from edge_agent.config import Transport
from tests.contracts.open_inference import OpenInferenceContract, Target
from tests.edge_agent import bundles
from tests.fakes import HUB_MODEL, FakeHub, Serving


class TestTheFakeHub(OpenInferenceContract):
    @pytest.fixture
    async def target(self) -> AsyncIterator[Target]:
        async with Serving(FakeHub()) as door:
            yield Target(door.address, HUB_MODEL)


@pytest.mark.parametrize(("door", "front_processes"), [("http2", 0), ("grpcio", 0), ("grpcio", 1)])
class TestTheHub(OpenInferenceContract):
    @pytest.fixture
    async def target(
        self, tmp_path: Path, front_processes: int, door: str
    ) -> AsyncIterator[Target]:
        version = tmp_path / "models" / "double" / "1"
        version.mkdir(parents=True)
        (version / "model.onnx").write_bytes((bundles.DATA / "double.onnx").read_bytes())
        config = HubConfig(
            data=tmp_path / "hub", models=tmp_path / "models", grpc="127.0.0.1:0",
            http="127.0.0.1:0", mqtt="off", front_processes=front_processes, door=door,
            drain_notice_s=0.0,
        )  # fmt: skip
        async with Hub(config) as hub:
            output = hub.repository.find("double").engine.outputs[0].name
            yield Target(hub.grpc_address, "double", output=output)


@pytest.mark.parametrize("door", ["http2", "grpcio"])
class TestTheAgent(OpenInferenceContract):
    @pytest.fixture
    async def target(self, tmp_path: Path, door: Transport) -> AsyncIterator[Target]:
        made = bundles.make(tmp_path / "bundle")
        config = AgentConfig(
            data=tmp_path / "data", bundle=(made.path,), grpc="127.0.0.1:0", http="off", door=door
        )
        async with Agent(config) as agent:
            yield Target(agent.endpoints["grpc"], "double")


class TestTheAgentInFrontOfAHub(OpenInferenceContract):
    @pytest.fixture
    async def target(self, tmp_path: Path) -> AsyncIterator[Target]:
        made = bundles.make(tmp_path / "bundle")
        async with Serving(FakeHub()) as door:
            config = AgentConfig(
                data=tmp_path / "data",
                bundle=(made.path,),
                grpc="127.0.0.1:0",
                http="off",
                hub=door.address,
            )
            async with Agent(config) as agent:
                yield Target(agent.endpoints["grpc"], "double")


def hub_config(folder: Path) -> HubConfig:
    """Return the options of a hub that serves the directory ``folder/models``."""
    return HubConfig(
        data=folder / "data", grpc="127.0.0.1:0", http="127.0.0.1:0", mqtt="off", threads=1,
        models=folder / "models",
    )  # fmt: skip


@pytest.fixture
async def hub_behind_a_hub(tmp_path: Path) -> AsyncIterator[str]:
    """The address of a hub whose model ``judge`` is run by another hub."""
    computing, asking = tmp_path / "computing", tmp_path / "asking"
    model = computing / "models" / HUB_MODEL / "1" / "model.onnx"
    model.parent.mkdir(parents=True)
    model.write_bytes((bundles.DATA / "double.onnx").read_bytes())
    async with Hub(hub_config(computing)) as behind:
        folder = asking / "models" / HUB_MODEL
        folder.mkdir(parents=True)
        (folder / "config.pbtxt").write_text(
            'backend: "upstream"\n'
            f'parameters {{ key: "url" value {{ string_value: "grpc://{behind.grpc_address}" }} }}'
        )
        async with Hub(hub_config(asking)) as hub:
            yield hub.grpc_address


class TestAHub(OpenInferenceContract):
    @pytest.fixture
    async def target(self, tmp_path: Path) -> AsyncIterator[Target]:
        model = tmp_path / "models" / HUB_MODEL / "1" / "model.onnx"
        model.parent.mkdir(parents=True)
        model.write_bytes((bundles.DATA / "double.onnx").read_bytes())
        async with Hub(hub_config(tmp_path)) as hub:
            yield Target(hub.grpc_address, HUB_MODEL)


class TestAHubInFrontOfAHub(OpenInferenceContract):
    @pytest.fixture
    async def target(self, hub_behind_a_hub: str) -> Target:
        return Target(hub_behind_a_hub, HUB_MODEL)


class TestTheAgentInFrontOfAHubInFrontOfAHub(OpenInferenceContract):
    @pytest.fixture
    async def target(self, tmp_path: Path, hub_behind_a_hub: str) -> AsyncIterator[Target]:
        made = bundles.make(tmp_path / "bundle")
        config = AgentConfig(
            data=tmp_path / "agent",
            bundle=(made.path,),
            grpc="127.0.0.1:0",
            http="off",
            hub=hub_behind_a_hub,
        )
        async with Agent(config) as agent:
            yield Target(agent.endpoints["grpc"], "double")
