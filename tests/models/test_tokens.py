"""A token classifier that has learnt something, from its recipe to a device that answers locally.

The family ``code_tokens`` is trained here, in seconds; nothing is downloaded.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
pytest.importorskip(
    "torch", reason="needs torch: pip install 'fogline[models]' in an environment of its own"
)
pytest.importorskip("transformers", reason="needs transformers: pip install 'fogline[models,hf]'")
pytest.importorskip("optimum.onnxruntime", reason="needs optimum: pip install 'fogline[hf]'")

from cloud_hub.config import HubConfig
from cloud_hub.hub import Hub
from edge_agent import Agent, AgentConfig, InferRequest
from fogline_models import build, data, recipe, report, steps
from fogline_models.cli import main
from fogline_models.data import Items
from fogline_models.session import Session
from fogline_protocol import release
from fogline_protocol.release import BundleDirectory
from fogline_protocol.score import Score
from fogline_protocol.tensors import Array
from tests.edge_agent.polling import until

pytestmark = pytest.mark.workshop

FAMILY = Path(__file__).parent / "code_tokens"
SCORE = Score("least_softmax", "logits", mask="attention_mask")


@dataclass(frozen=True)
class Built:
    edge: BundleDirectory
    hub: BundleDirectory
    prepared: Mapping[str, Path]  # by split, what the nets take

    def split(self, name: str) -> Items:
        return data.read(self.prepared[name])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("code-tokens")
    cache = steps.Steps(folder / "steps", lambda line: None)
    hub, edge = build.build(recipe.read(FAMILY), folder / "out", cache, lambda line: None)
    # Both nets have the same tokenizer, hence the same prepared splits.
    place = next((folder / "steps").rglob("prepared/training.npz")).parent
    return Built(edge.directory, hub.directory, {path.stem: path for path in place.glob("*.npz")})


def run(directory: BundleDirectory, variant: str, inputs: Mapping[str, Array]) -> Array:
    """Return what a device computes, one row at a time."""
    return Session(directory.file(f"variants/{variant}.onnx")).run(inputs, 1)["logits"]


def by_hand(logits: Array, mask: Array) -> list[float]:
    """Return the score of every text, token by token."""
    scores = []
    for row, counts in zip(logits.astype(np.float64), mask, strict=True):
        shares = [
            np.exp(token - token.max()) for token, one in zip(row, counts, strict=True) if one
        ]
        scores.append(min(float(share.max() / share.sum()) for share in shares))
    return scores


def test_its_tokens_have_an_accuracy_and_the_report_says_that_they_are_tokens(
    built: Built,
) -> None:
    document = report.read(built.edge.path)
    assert document is not None
    found = document["figures"]["evaluation"]
    items = built.split("evaluation")
    assert items.labels is not None
    labelled = items.labels != -100
    assert found["counted"] == "tokens"
    assert found["items"] == items.inputs["attention_mask"].sum()
    assert found["scenes"] == len(set(items.scenes.tolist()))

    top = run(built.edge, "fp32", items.inputs).argmax(axis=-1)
    fp32 = found["variants"]["fp32"]
    assert fp32["accuracy"]["items"] == labelled.sum() < found["items"]
    right = (top == items.labels)[labelled].mean()
    assert fp32["accuracy"]["value"] == pytest.approx(right, abs=2e-3)
    assert fp32["accuracy"]["value"] > 0.85  # it has learnt something
    assert found["hub"]["accuracy"]["value"] > fp32["accuracy"]["value"]
    assert np.sum(fp32["confusion"]) == labelled.sum()
    assert {"keyword", "name", "operator"} <= fp32["recall"].keys()
    assert {part["name"] for part in fp32["slices"]} == {"short", "long"}
    assert 0 < fp32["calibration_error"] < 0.2
    assert found["variants"]["int8-dynamic"]["agreement"]["value"] > 0.98

    card = (built.edge.path / "README.md").read_text()
    assert f"Figures on {found['items']:,} held-out tokens" in card
    assert f"{labelled.sum():,} of them with a label" in card
    note = "its score is that of its least certain token"
    assert note not in card  # it explains the page's figures:
    assert note in (built.edge.path / "report.html").read_text()


def test_its_certificate_lets_exactly_the_allowed_texts_differ(built: Built) -> None:
    assert built.edge.bundle.score == SCORE
    certificates = {found.variant: found for found in built.edge.certificates}
    assert certificates.keys() == {"int8-dynamic", "fp32"}
    items = built.split("calibration")
    once = items.independent
    inputs = {name: array[once] for name, array in items.inputs.items()}
    mask = inputs["attention_mask"]
    hub = Session(built.hub.file("variants/fp32.onnx")).run(inputs, 64)["logits"]
    for variant, certificate in certificates.items():
        assert certificate.score == SCORE
        assert certificate.scenes == len(once)
        local = run(built.edge, variant, inputs)
        differs = ((local.argmax(axis=-1) != hub.argmax(axis=-1)) & (mask == 1)).any(axis=1)
        scores = np.array(by_hand(local, mask))
        local_answers = scores > certificate.threshold + 1e-6  # by_hand has more digits
        assert differs.sum() > certificate.allowed_losses  # or this says nothing
        assert (differs & local_answers).sum() == certificate.allowed_losses
        assert 0.1 < certificate.escalation_rate < 0.9
    (at,) = (
        each["at"]
        for each in report.read(built.edge.path)["figures"]["escalation"]  # type: ignore[index]
        if each["variant"] == "fp32"
    )
    assert at["disagreement"] < 0.2
    evaluation = report.read(built.edge.path)["figures"]["evaluation"]  # type: ignore[index]
    assert at["accuracy"] > evaluation["variants"]["fp32"]["accuracy"]["value"]


def command(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_commands_take_its_files(built: Built, tmp_path: Path) -> None:
    calibration = built.prepared["calibration"]
    told = command(
        "certify", built.edge.path, "--hub", built.hub.path, "--data", calibration,
        "--alpha", "0.1", "--variant", "fp32", "--out", tmp_path,
    )  # fmt: skip
    (before,) = (found for found in built.edge.certificates if found.variant == "fp32")
    assert f"answers locally above {before.threshold:.4f}" in told

    files = [built.edge.file(f"variants/{name}.onnx") for name in ("fp32", "int8-dynamic")]
    evaluation = built.prepared["evaluation"]
    hub = built.hub.file("variants/fp32.onnx")
    found = json.loads(command("evaluate", *files, "--data", evaluation, "--hub", hub, "--json"))
    reported = report.read(built.edge.path)["figures"]["evaluation"]  # type: ignore[index]
    for name in ("fp32", "int8-dynamic"):
        for figure in ("accuracy", "agreement_hub", "macro_f1"):
            mine = found["evaluation"]["variants"][name][figure]
            assert mine == reported["variants"][name][figure]
    told = command("compare", built.hub.path, built.edge.path, "--data", evaluation)
    assert f"of {reported['items']:,} tokens (95 %" in told
    told = command("inspect", built.edge.path)
    assert "score       least_softmax of logits where attention_mask counts" in told


def request(inputs: Mapping[str, Array], **parameters: Any) -> InferRequest:
    named = {f"fogline.{name}": value for name, value in parameters.items()}
    return InferRequest("code-tokens", inputs, parameters=named)


async def test_a_device_answers_locally_what_it_is_sure_of_and_escalates_the_rest(
    built: Built, tmp_path: Path
) -> None:
    served = tmp_path / "models" / "code-tokens-hub" / "1"
    served.mkdir(parents=True)
    (served / "model.onnx").write_bytes(built.hub.file("variants/fp32.onnx").read_bytes())
    items = built.split("evaluation")
    texts = {name: array[:48] for name, array in items.inputs.items()}
    mask = texts["attention_mask"]
    (certificate,) = (c for c in built.edge.certificates if c.variant == "int8-dynamic")
    alone = run(built.edge, "int8-dynamic", texts)
    scores = by_hand(alone, mask)
    theirs = Session(built.hub.file("variants/fp32.onnx")).run(texts, 64)["logits"]
    hub_config = HubConfig(
        data=tmp_path / "hub", grpc="127.0.0.1:0", http="127.0.0.1:0", mqtt="off",
        models=tmp_path / "models", threads=1, drain_notice_s=0,
    )  # fmt: skip
    async with Hub(hub_config) as hub:
        config = AgentConfig(
            data=tmp_path / "device", grpc="off", http="off", threads=1, deadline_s=30,
            bundle=(built.edge.path,), hub=hub.grpc_address,
        )  # fmt: skip
        async with Agent(config) as agent:
            uplink = agent.uplink
            assert uplink is not None
            await until(lambda: uplink.link_up and uplink.round_trip_s > 0)
            tiers = []
            for row in range(len(mask)):
                one = {name: array[row : row + 1] for name, array in texts.items()}
                answer = await agent.infer(request(one))
                said = answer.parameters
                assert said["fogline.score"] == pytest.approx(scores[row], abs=1e-5)
                sure = said["fogline.score"] > certificate.threshold
                tiers.append(said["fogline.tier"])
                assert said["fogline.tier"] == ("edge" if sure else "hub")
                assert said["fogline.quality"] == ("certified" if sure else "hub")
                want = alone if sure else theirs
                np.testing.assert_allclose(
                    answer.outputs["logits"][0], want[row], rtol=1e-3, atol=1e-3
                )
            assert 5 < tiers.count("edge") < 43

    # Without its hub; who comes with a text changes nothing of its score, nor does padding.
    config = AgentConfig(
        data=tmp_path / "device", grpc="off", http="off", threads=1, bundle=(built.edge.path,)
    )
    async with Agent(config) as agent:
        together = (await agent.infer(request(texts, per_row=True))).outputs["fogline.score"]
        for row in range(8):
            length = int(mask[row].sum())
            cut = {name: array[row : row + 1, :length] for name, array in texts.items()}
            short = (await agent.infer(request(cut))).parameters["fogline.score"]
            assert together[row] == pytest.approx(scores[row], abs=1e-5)
            # int8 takes its scales from the whole row, padding included; fp32 is exact below.
            assert short == pytest.approx(scores[row], abs=0.03)
    padded = run(built.edge, "fp32", texts)
    for row in range(8):
        length = int(mask[row].sum())
        cut = {name: array[row : row + 1, :length] for name, array in texts.items()}
        own = by_hand(run(built.edge, "fp32", cut), cut["attention_mask"])
        assert own == pytest.approx(by_hand(padded[row : row + 1], mask[row : row + 1]), abs=1e-4)


def test_bundles_are_read_as_they_were_written(built: Built) -> None:
    for directory in (built.edge, built.hub):
        assert release.read(directory.path).bundle.score == SCORE
        assert release.parse(directory.bundle.to_json()) == directory.bundle
