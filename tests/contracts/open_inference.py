"""What any Open Inference server of fogline keeps to: the fake hub, the agent, and others.

A subclass gives the fixture ``target``: a real door with a model of one input and one
output, FP32 [n, 3], and what it is called.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from fogline_protocol.client import Client
from fogline_protocol.errors import BadRequest, NotFound
from fogline_protocol.inference import InferRequest


@dataclass(frozen=True, slots=True)
class Target:
    """A server to be held against the contract."""

    address: str
    model: str
    input: str = "x"
    output: str = "logits"


class OpenInferenceContract:
    """The promises; run against every server by the subclasses of ``test_open_inference``."""

    @pytest.fixture
    async def client(self, target: Target) -> AsyncIterator[Client]:
        client = Client(target.address)
        yield client
        await client.close()

    async def test_it_is_ready(self, client: Client) -> None:
        assert await client.server_ready(5.0)

    async def test_its_metadata_are_its_contract(self, client: Client, target: Target) -> None:
        found = await client.model_metadata(target.model, timeout_s=5.0)
        assert found.name == target.model
        assert [(s.name, s.datatype, s.shape) for s in found.inputs] == [
            (target.input, "FP32", (-1, 3))
        ]
        assert [s.name for s in found.outputs] == [target.output]
        assert found.versions
        assert all(version.isdecimal() for version in found.versions)

    @pytest.mark.parametrize("rows", [1, 2, 7])
    async def test_there_is_one_output_row_per_input_row(
        self, client: Client, target: Target, rows: int
    ) -> None:
        x = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
        request = InferRequest(target.model, {target.input: x}, id="some-id")
        response = await client.infer(request, 5.0)
        assert response.outputs[target.output].shape == (rows, 3)
        assert response.outputs[target.output].dtype == np.float32
        assert (response.id, response.model) == ("some-id", target.model)

    async def test_rows_do_not_depend_on_their_company(
        self, client: Client, target: Target
    ) -> None:
        x = np.array([[0.1, 0, 0], [9, 0, 0], [0.3, 0.2, 0.1]], np.float32)
        together = await client.infer(InferRequest(target.model, {target.input: x}), 5.0)
        for row in range(len(x)):
            request = InferRequest(target.model, {target.input: x[row : row + 1]})
            alone = await client.infer(request, 5.0)
            assert alone.outputs[target.output][0] == pytest.approx(
                together.outputs[target.output][row]
            )

    async def test_every_answer_says_which_tier_gave_it(
        self, client: Client, target: Target
    ) -> None:
        x = np.zeros((1, 3), np.float32)
        response = await client.infer(InferRequest(target.model, {target.input: x}), 5.0)
        assert response.parameters["fogline.tier"] in ("edge", "hub", "mixed")
        assert response.parameters["fogline.release"]

    async def test_an_unknown_model_is_not_found(self, client: Client, target: Target) -> None:
        x = {target.input: np.zeros((1, 3), np.float32)}
        with pytest.raises(NotFound, match="no-such-model"):
            await client.infer(InferRequest("no-such-model", x), 5.0)
        with pytest.raises(NotFound, match="no-such-model"):
            await client.model_metadata("no-such-model", timeout_s=5.0)

    async def test_an_unknown_version_is_not_found(self, client: Client, target: Target) -> None:
        with pytest.raises(NotFound, match="4711"):
            await client.model_metadata(target.model, "4711", timeout_s=5.0)

    @pytest.mark.parametrize(
        "x", [np.zeros((1, 4), np.float32), np.zeros((1, 3), np.int64), np.zeros(3, np.float32)]
    )
    async def test_a_tensor_that_does_not_fit_is_the_callers_fault(
        self,
        client: Client,
        target: Target,
        x: np.ndarray,
    ) -> None:
        with pytest.raises(BadRequest, match=target.input):
            await client.infer(InferRequest(target.model, {target.input: x}), 5.0)

    async def test_a_missing_input_and_an_unknown_output_are_named(
        self, client: Client, target: Target
    ) -> None:
        with pytest.raises(BadRequest, match="is missing"):
            await client.infer(InferRequest(target.model, {}), 5.0)
        x = {target.input: np.zeros((1, 3), np.float32)}
        with pytest.raises(BadRequest, match="no-such-output"):
            await client.infer(InferRequest(target.model, x, outputs=["no-such-output"]), 5.0)

    async def test_its_configuration_agrees_with_its_metadata(self, target: Target) -> None:
        async with triton.InferenceServerClient(target.address) as theirs:
            config = (await theirs.get_model_config(target.model)).config
            metadata = await theirs.get_model_metadata(target.model)
        assert config.name == target.model
        assert config.max_batch_size > 0
        (tensor,), (described,) = config.input, metadata.inputs
        assert [-1, *tensor.dims] == list(described.shape)
        assert [o.name for o in config.output] == [o.name for o in metadata.outputs]

    async def test_every_request_grows_the_queue_statistic(self, target: Target) -> None:
        x = triton.InferInput(target.input, [2, 3], "FP32")
        x.set_data_from_numpy(np.zeros((2, 3), np.float32))
        async with triton.InferenceServerClient(target.address) as theirs:
            for count in (1, 2):
                await theirs.infer(target.model, [x])
                answer = await theirs.get_inference_statistics(target.model)
                (found,) = answer.model_stats
                assert found.version.isdecimal()
                assert found.inference_stats.queue.count == count
                assert found.inference_stats.success.count == count
                assert found.inference_count == 2 * count
                assert found.batch_stats[0].batch_size == 2
            everything = (await theirs.get_inference_statistics()).model_stats
        assert target.model in [stats.name for stats in everything]

    async def test_a_stream_is_answered_in_order(self, target: Target) -> None:
        async def requests() -> AsyncIterator[dict[str, object]]:
            for at in range(5):
                x = triton.InferInput(target.input, [1, 3], "FP32")
                x.set_data_from_numpy(np.full((1, 3), at, np.float32))
                yield {"model_name": target.model, "inputs": [x], "request_id": str(at)}

        async with triton.InferenceServerClient(target.address) as theirs:
            ids = [answer.get_response().id async for answer, _ in theirs.stream_infer(requests())]
        assert ids == list("01234")

    async def test_classification_ranks_row_by_row(self, target: Target) -> None:
        x = triton.InferInput(target.input, [2, 3], "FP32")
        x.set_data_from_numpy(np.array([[0, 2, 1], [3, 0, 1]], np.float32))
        best = triton.InferRequestedOutput(target.output, class_count=1)
        async with triton.InferenceServerClient(target.address) as theirs:
            answer = await theirs.infer(target.model, [x], outputs=[best])
        indices = [text.split(b":")[1] for text in answer.as_numpy(target.output).ravel()]
        assert indices == [b"1", b"0"]

    async def test_shared_memory_is_off_and_the_option_is_named(self, target: Target) -> None:
        async with triton.InferenceServerClient(target.address) as theirs:
            assert "system_shared_memory" not in (await theirs.get_server_metadata()).extensions
            with pytest.raises(InferenceServerException, match="--allow-shared-memory") as caught:
                await theirs.unregister_system_shared_memory()
        assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
