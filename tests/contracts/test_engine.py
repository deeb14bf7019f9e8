from pathlib import Path

import pytest

from cloud_hub.config import HubConfig
from cloud_hub.engines.launch import Launcher
from cloud_hub.engines.upstream import Upstream, UpstreamEngine
from cloud_hub.hub import Hub
from fogline_protocol import documents
from tests.cloud_hub.inference.test_batcher import Doubling
from tests.contracts.engine import EngineContract, RunContract

DOUBLE = Path(__file__).parents[1] / "edge_agent" / "data" / "double.onnx"


class TestTheFakeEngine(RunContract):
    @pytest.fixture
    async def engine(self):
        return Doubling()


class TestInline(EngineContract):
    @pytest.fixture
    async def engine(self):
        engine = await Launcher(threads=1).open(DOUBLE)
        yield engine
        await engine.close()


class TestProcess(EngineContract):
    @pytest.fixture
    async def engine(self):
        engine = await Launcher(threads=1).open_apart(DOUBLE)
        yield engine
        await engine.close()


class TestUpstream(EngineContract):
    """In front of another hub."""

    @pytest.fixture
    async def engine(self, tmp_path):
        model = tmp_path / "models" / "double" / "1" / "model.onnx"
        model.parent.mkdir(parents=True)
        model.write_bytes(DOUBLE.read_bytes())
        config = HubConfig(
            data=tmp_path / "hub", grpc="127.0.0.1:0", http="127.0.0.1:0", mqtt="off", threads=1,
            models=tmp_path / "models",
        )  # fmt: skip
        async with Hub(config) as hub:
            engine = await UpstreamEngine.start(Upstream(hub.grpc_address, "double"))
            yield engine
            await engine.close()

    async def test_it_names_the_digest_of_the_file_that_computes(self, engine):
        assert engine.digest == documents.sha256_of_file(DOUBLE)
