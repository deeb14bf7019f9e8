from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from edge_agent import Agent, AgentConfig
from tests.contracts.open_inference import OpenInferenceContract, Target
from tests.edge_agent import bundles
from tests.fakes import HUB_MODEL, FakeHub, Serving


class TestTheFakeHub(OpenInferenceContract):
    @pytest.fixture
    async def target(self) -> AsyncIterator[Target]:
        async with Serving(FakeHub()) as door:
            yield Target(door.address, HUB_MODEL)


class TestTheAgent(OpenInferenceContract):
    @pytest.fixture
    async def target(self, tmp_path: Path) -> AsyncIterator[Target]:
        made = bundles.make(tmp_path / "bundle")
        config = AgentConfig(
            data=tmp_path / "data", bundle=(made.path,), grpc="127.0.0.1:0", http="off"
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
