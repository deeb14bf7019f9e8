"""Which releases the hub serves itself, and that it does so as they are accepted."""

import asyncio
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from structlog.testing import capture_logs

from cloud_hub.config import HubConfig
from cloud_hub.hub import Hub
from cloud_hub.inference.registry import Registry, on_the_hub
from fogline_protocol.client import Client
from fogline_protocol.errors import NotFound
from fogline_protocol.inference import InferRequest
from fogline_protocol.release import Pairing, read


def release(model, number, sha256="", pair=None):
    return SimpleNamespace(
        model=model, number=number, bundle_sha256=sha256 or f"{model}{number}", escalates_to=pair
    )


def served(*releases):
    return {model: [found.number for found in mine] for model, mine in on_the_hub(releases).items()}


def test_models_that_escalate_are_for_devices():
    assert served(release("judge", 1), release("digits", 1, pair=Pairing("judge", "judge1"))) == {
        "judge": [1]
    }


def test_an_older_release_is_served_as_long_as_another_is_paired_with_it():
    judges = [release("judge", number) for number in (3, 1, 2)]
    assert served(*judges) == {"judge": [3]}
    assert served(*judges, release("digits", 1, pair=Pairing("judge", "judge1"))) == {
        "judge": [1, 3]
    }
    assert served(*judges, release("digits", 1, pair=Pairing("other", "judge1"))) == {"judge": [3]}


@pytest.fixture
async def hub(tmp_path):
    config = HubConfig(
        data=tmp_path / "hub", grpc="127.0.0.1:0", http="127.0.0.1:0", mqtt="off", threads=1
    )
    async with Hub(config) as hub:
        yield hub


async def ask(hub, **parameters):
    client = Client(hub.grpc_address)
    try:
        image = np.zeros((2, 1, 8, 8), np.float32)
        return await client.infer(
            InferRequest("digits-hub", {"image": image}, parameters=parameters), 5.0
        )
    finally:
        await client.close()


async def test_an_accepted_release_is_served_and_again_after_a_restart(hub, digits):
    with pytest.raises(NotFound):
        await ask(hub)
    made = await hub.fleet.releases.accept(digits / "bundles" / "digits-hub-1.0.0")
    async with asyncio.timeout(20):
        while not hub.repository.versions("digits-hub"):
            await asyncio.sleep(0.01)
    answer = await ask(hub)
    assert answer.version == "1"
    # The file that certificates name: the bundle's first variant.
    first = made.bundle.variants[0]
    assert answer.parameters["fogline.digest"] == made.bundle.files[first.path].sha256
    model = hub.repository.find("digits-hub")
    assert model.config.max_batch_size == hub.config.max_batch  # the bundle would take 256
    assert list(model.config.labels["logits"]) == list("0123456789")

    await hub.fleet.releases.accept(digits / "bundles" / "digits-1.0.0")
    await Registry(hub.fleet.releases, hub.repository, hub.config.data / "again").serve()
    assert hub.repository.find("digits-hub") is model  # undisturbed
    assert not hub.repository.versions("digits")

    await hub.__aexit__(None, None, None)
    async with Hub(hub.config) as again:
        assert (await ask(again)).version == "1"


async def test_a_variant_that_mixes_rows_gets_them_one_at_a_time(hub, digits, tmp_path):
    folder = tmp_path / "digits-hub"
    shutil.copytree(digits / "bundles" / "digits-hub-1.0.0", folder)
    bundle = read(folder).bundle
    variants = tuple(replace(variant, max_rows=1) for variant in bundle.variants)
    (folder / "bundle.json").write_bytes(replace(bundle, variants=variants).to_json())
    await hub.fleet.releases.accept(folder)
    async with asyncio.timeout(20):
        while not hub.repository.versions("digits-hub"):
            await asyncio.sleep(0.01)
    assert hub.repository.find("digits-hub").config.max_batch_size == 1
    assert (await ask(hub)).outputs["logits"].shape == (2, 10)  # taken apart, and put together


async def test_the_directory_takes_precedence(tmp_path, triton_directory, digits):
    config = HubConfig(
        data=tmp_path / "hub", grpc="127.0.0.1:0", http="127.0.0.1:0", mqtt="off", threads=1,
        models=triton_directory,
    )  # fmt: skip
    async with Hub(config) as hub:
        with capture_logs() as logs:
            await hub.fleet.releases.accept(digits / "bundles" / "digits-hub-1.0.0")
            await Registry(hub.fleet.releases, hub.repository, tmp_path / "hub" / "again").serve()
        assert (await ask(hub)).version == "3"
        # The README's own steps: the same bytes in the directory and in the registry.
        assert [line for line in logs if "directory" in line["event"]] == []


async def test_releases_that_the_directory_keeps_from_being_served_are_named_once(
    tmp_path, triton_directory, digits
):
    model = triton_directory / "digits-hub" / "3" / "model.onnx"
    # Other bytes of the same model: a field that no reader knows (number 1000, a varint).
    model.write_bytes(model.read_bytes() + b"\xc0\x3e\x01")
    config = HubConfig(
        data=tmp_path / "hub", grpc="127.0.0.1:0", http="127.0.0.1:0", mqtt="off", threads=1,
        models=triton_directory,
    )  # fmt: skip
    async with Hub(config) as hub:
        with capture_logs() as logs:
            await hub.fleet.releases.accept(digits / "bundles" / "digits-hub-1.0.0")
            again = Registry(hub.fleet.releases, hub.repository, tmp_path / "hub" / "again")
            await again.serve()
            await again.serve()
        (told,) = [line for line in logs if "directory" in line["event"]]
        assert (told["log_level"], told["model"]) == ("warning", "digits-hub")
        assert told["releases"] == ["1"]


async def test_a_device_is_answered_by_the_release_that_its_certificate_compares_with(
    tmp_path, triton_directory
):
    newer = triton_directory / "digits-hub" / "4"
    newer.mkdir()
    first = (triton_directory / "digits-hub" / "3" / "model.onnx").read_bytes()
    # Other bytes of the same model: a field that no reader knows (number 1000, a varint).
    (newer / "model.onnx").write_bytes(first + b"\xc0\x3e\x01")
    (triton_directory / "digits-hub" / "config.pbtxt").write_text("version_policy { all { } }")
    config = HubConfig(
        data=tmp_path / "hub", grpc="127.0.0.1:0", http="127.0.0.1:0", mqtt="off", threads=1,
        models=triton_directory,
    )  # fmt: skip
    async with Hub(config) as hub:
        served = {model.version: model.sha256 for model in hub.repository.find_all("", "")}
        assert len(set(served.values())) == 2
        for version, wish in (("3", served["3"]), ("4", served["4"]), ("4", "unknown"), ("4", 7)):
            answer = await ask(hub, **{"fogline.digest": wish})
            assert (answer.version, answer.parameters["fogline.digest"]) == (
                version,
                served[version],
            )
