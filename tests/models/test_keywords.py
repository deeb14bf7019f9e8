"""The synthetic keywords: who says what in which split, the noise, the front end, espeak-ng."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fogline_models.errors import BadInput
from keywords import data, espeak, log_mel

SHARED = ("training", "self_test")  # the voices of training
SAYING = data.utterances()


def has_espeak() -> bool:
    try:
        ctypes.CDLL(data.LIBRARY)
    except OSError:
        return False
    return True


speaks = pytest.mark.skipif(not has_espeak(), reason="needs espeak-ng: apt-get install espeak-ng")


def tones(count: int) -> data.Waves:
    """Words that any machine can say: a tone of its own length, from the first sample on."""
    length = np.linspace(1000, 6000, count).astype(int)[:, None]
    at = np.arange(data.SAMPLES)
    tone = np.where(at < length, 0.5 * np.cos(2 * np.pi * 440 * at / data.RATE_HZ), 0)
    return tone.astype(np.float32)


# Who says what


def test_no_utterance_is_in_two_splits_or_twice_in_one() -> None:
    everything = [utterance for part in SAYING.values() for utterance in part]
    assert len(set(everything)) == len(everything)


def test_a_voice_that_is_trained_on_is_heard_nowhere_else() -> None:
    voices = {name: {one.voice for one in part} for name, part in SAYING.items()}
    trained = voices["training"] | voices["self_test"]
    assert not trained & (voices["calibration"] | voices["evaluation"] | voices["drift"])
    assert not voices["drift"] & (trained | voices["calibration"] | voices["evaluation"])


def test_calibration_and_evaluation_are_drawn_from_the_same_voices() -> None:
    assert {one.voice for one in SAYING["calibration"]} == {
        one.voice for one in SAYING["evaluation"]
    }


def test_every_voice_is_of_one_group() -> None:
    groups = data.voices()
    assert sorted(voice for group in groups for voice in group) == sorted(data.VOICES)
    assert [len(group) for group in groups] == [20, 8, 8]


def test_every_split_says_every_keyword_about_equally_often() -> None:
    for name in ("training", "calibration", "evaluation", "drift"):
        shares = np.bincount([one.label for one in SAYING[name]]) / len(SAYING[name])
        assert len(shares) == len(data.LABELS)
        assert shares.min() > 0.5 / len(data.LABELS)
        assert shares.max() < 1.6 / len(data.LABELS)


def test_what_is_said_depends_on_the_seed_alone() -> None:
    assert data.utterances() == SAYING


# Noise


def test_the_same_stream_of_randomness_gives_the_same_noise() -> None:
    clips = tones(3)
    once, snr = data.heard(clips, np.random.default_rng(1))
    again, same_snr = data.heard(clips, np.random.default_rng(1))
    np.testing.assert_array_equal(once, again)
    np.testing.assert_array_equal(snr, same_snr)
    assert not np.array_equal(once, data.heard(clips, np.random.default_rng(2))[0])


def test_what_is_heard_is_what_a_microphone_delivers() -> None:
    waves, snr_db = data.heard(tones(300), np.random.default_rng(0))
    assert waves.dtype == np.float32
    assert waves.shape == (300, data.SAMPLES)
    peaks = 20 * np.log10(np.abs(waves).max(axis=1))
    low, high = data.LEVEL_DB
    assert low - 0.1 < peaks.min() < low + 2
    assert high - 2 < peaks.max() < high + 0.1
    assert (snr_db >= data.SNR_DB[0]).all()
    assert (snr_db <= data.SNR_DB[1]).all()


def test_the_snr_that_is_reported_is_the_one_that_is_heard() -> None:
    """The tone stands in a narrow band, so noise can be measured beside it."""
    waves, snr_db = data.heard(tones(300), np.random.default_rng(0))
    power = np.abs(np.fft.rfft(waves)) ** 2
    tone = power[:, 400:480].sum(axis=1)
    noise = power.sum(axis=1) - tone
    share = (np.linspace(1000, 6000, 300).astype(int)) / data.SAMPLES  # of the second
    found = 10 * np.log10(tone / noise / share)
    assert np.corrcoef(found, snr_db)[0, 1] > 0.9
    assert abs(float(np.median(found - snr_db))) < 3  # the echo adds, colored noise hides some


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0])
def test_noise_has_the_color_that_was_asked_for(slope: float) -> None:
    slopes, no_hum = np.full((64, 1), slope, np.float32), np.zeros((64, 1), np.float32)
    noise = data._noise(slopes, no_hum, np.random.default_rng(0))
    assert (noise**2).mean() == pytest.approx(1, rel=0.02)
    power = (np.abs(np.fft.rfft(noise)) ** 2).mean(axis=0)
    octaves = [power[low : 2 * low].mean() for low in (100, 200, 400, 800, 1600)]
    falls = np.polyfit(np.arange(5), np.log2(octaves), 1)[0]
    assert falls == pytest.approx(-slope, abs=0.1)


def test_a_stretched_word_is_as_much_higher_as_it_is_shorter() -> None:
    positions = np.arange(data.SAMPLES, dtype=np.float32)[None]
    faster = data._read(tones(1), positions * np.float32(1.25))
    assert np.abs(np.fft.rfft(faster[0])).argmax() == pytest.approx(440 * 1.25, abs=5)
    np.testing.assert_array_equal(data._read(tones(1), positions), tones(1))
    outside = data._read(np.ones((1, data.SAMPLES), np.float32), positions - data.SAMPLES)
    np.testing.assert_array_equal(outside, np.zeros((1, data.SAMPLES), np.float32))


@pytest.mark.parametrize(
    ("snr_db", "says"), [(0.0, "+0 to +5 dB"), (4.99, "+0 to +5 dB"), (19.9, "+15 to +20 dB")]
)
def test_a_slice_is_a_band_of_noise(snr_db: float, says: str) -> None:
    assert data.band(snr_db) == says


# The front end


def test_the_kernels_are_numpys_own_fourier_transform() -> None:
    frames = np.random.default_rng(0).uniform(-1, 1, (9, log_mel.FRAME))
    window = np.hanning(log_mel.FRAME + 1)[:-1]  # the periodic one
    want = np.fft.rfft(frames * window) * (data.PCM / window.sum())
    cosines, sines = np.split(frames @ log_mel.fourier_kernels().T, 2, axis=1)
    np.testing.assert_allclose(cosines - 1j * sines, want, atol=0.02)  # of amplitudes of 1,000s


def test_every_mel_filter_hears_something_and_peaks_above_the_one_before() -> None:
    filters = log_mel.mel_filters()
    assert (filters >= 0).all()
    assert (filters.sum(axis=1) > 0.5).all()
    centers = (filters * np.arange(filters.shape[1])).sum(axis=1) / filters.sum(axis=1)
    assert (np.diff(centers) > 0).all()
    hz = np.arange(filters.shape[1]) * data.RATE_HZ / log_mel.FRAME
    inside = (hz > 200) & (hz < 3400)  # between the first and the last peak
    np.testing.assert_allclose(filters[:, inside].sum(axis=0), 1, atol=1e-6)  # nothing is lost


def features(waves: data.Waves) -> Any:
    """Return log-mel features as numpy makes them: the oracle of the graph."""
    frames = waves.reshape(len(waves), -1, log_mel.FRAME).astype(np.float64)
    window = np.hanning(log_mel.FRAME + 1)[:-1]
    power = np.abs(np.fft.rfft(frames * window) * (data.PCM / window.sum())) ** 2
    loudness = np.log(power @ log_mel.mel_filters().T.astype(np.float64) + log_mel.FLOOR)
    loudness = loudness.transpose(0, 2, 1)
    return (loudness - loudness.mean(axis=(1, 2), keepdims=True))[:, None]


# espeak-ng


def test_without_espeak_a_build_says_what_to_install() -> None:
    with pytest.raises(BadInput, match=r"^data: .*espeak-ng, which is not installed: apt-get inst"):
        data.spoken(SAYING["self_test"][:1], library="libespeak-that-is-not-there.so.1")


@speaks
def test_a_voice_that_espeak_does_not_have_is_named() -> None:
    nobody = data.Utterance("yes", "nobody", "gmw/xx", 160, 50)
    with pytest.raises(BadInput, match=r"^data: espeak-ng does not say 'yes' as gmw/xx\+nobody"):
        data.spoken([nobody])


@speaks
@pytest.mark.workshop
def test_the_same_words_sound_the_same_every_time() -> None:
    pytest.importorskip("scipy", reason="needs scipy: pip install 'fogline[models]'")
    said = SAYING["self_test"]
    clips = data.spoken(said)
    np.testing.assert_array_equal(data.spoken(said), clips)
    assert clips.shape == (len(said), data.SAMPLES)
    assert (np.abs(clips[:, 0]) > 0).all()  # the word begins at once
    length = data.SAMPLES - (clips[:, ::-1] != 0).argmax(axis=1)
    assert (length > data.RATE_HZ * 0.08).all()
    assert (length < data.SAMPLES).all()  # and ends before the second does


# The nets


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Any, Path]:
    """A net, untrained, and its file."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'fogline[models]'")
    from fogline_models.export import export
    from fogline_protocol.tensors import TensorSpec
    from keywords import nets

    torch.manual_seed(0)
    net = nets.net(nets.EDGE, dropout=0.0).eval()
    path = tmp_path / "fp32.onnx"
    takes = (TensorSpec("audio", "FP32", (-1, data.SAMPLES)),)
    gives = (TensorSpec("logits", "FP32", (-1, len(data.LABELS))),)
    examples, _ = data.heard(tones(5), np.random.default_rng(0))
    export(net, takes, gives, {"audio": examples}, 16, {}, path)
    return net, path


@pytest.mark.workshop
def test_the_front_end_in_the_graph_is_numpys_log_mel(exported: tuple[Any, Path]) -> None:
    import torch

    net, _ = exported
    waves, _ = data.heard(tones(40), np.random.default_rng(3))
    with torch.no_grad():
        found = net.front_end(torch.from_numpy(waves)).numpy()
    assert found.shape == (40, 1, log_mel.MELS, data.SAMPLES // log_mel.FRAME)
    np.testing.assert_allclose(found, features(waves), atol=2e-3)


@pytest.mark.workshop
def test_silence_has_an_answer(exported: tuple[Any, Path]) -> None:
    from fogline_models.session import Session

    _, path = exported
    silence = {"audio": np.zeros((1, data.SAMPLES), np.float32)}
    assert np.isfinite(Session(path).run(silence, 1)["logits"]).all()


@pytest.mark.workshop
def test_the_front_end_stays_fp32_when_the_rest_is_quantized(
    exported: tuple[Any, Path], tmp_path: Path
) -> None:
    import onnx

    from fogline_models.quantize import quantize

    _, path = exported
    ranges, _ = data.heard(tones(70), np.random.default_rng(1))
    target = tmp_path / "int8.onnx"
    quantize(path, "int8-qdq", {"audio": ranges}, {}, target, keep=["front_end/*"])
    model = onnx.load(str(target))
    front = [node for node in model.graph.node if node.name.startswith("front_end/")]
    assert {"Conv", "Log", "ReduceMean"} <= {node.op_type for node in front}
    kernels = {tensor.name: tensor for tensor in model.graph.initializer}
    convolutions = [node for node in front if node.op_type == "Conv"]
    assert all(kernels[node.input[1]].data_type == onnx.TensorProto.FLOAT for node in convolutions)
    assert any(node.op_type == "QuantizeLinear" for node in model.graph.node)


@pytest.mark.workshop
def test_training_twice_gives_the_same_weights() -> None:
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'fogline[models]'")
    from fogline_models.data import Items
    from keywords import nets

    items = Items({"audio": tones(64)}, np.arange(64) % len(data.LABELS))
    once, again = (
        nets.edge({"training": items}, lambda *_: None, epochs=2).state_dict() for _ in range(2)
    )
    assert not once.keys() ^ again.keys()
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_the_recipe_names_the_labels_in_the_order_of_the_data() -> None:
    import tomllib

    recipe = Path(espeak.__file__).with_name("recipe.toml")
    assert tuple(tomllib.loads(recipe.read_text())["labels"]) == data.LABELS
