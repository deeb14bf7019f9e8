"""Which utterance belongs to which split, how it is spoken, and the noise in which it is heard.

The speech is synthetic: espeak-ng, a formant synthesizer, says one word in one of its voice
variants. It says nothing about human speech. Always true here:

- an *utterance* (word, voice, accent, rate, pitch) belongs to one split only, and it is split
  before anything is spoken or made noisy; its noisy copies are one *scene*;
- a voice that is trained on is heard in no other split than ``ranges`` and ``self_test``;
- calibration and evaluation are drawn alike, at random from the same voices, because a
  certificate speaks of requests that are drawn like its calibration set, and of no others;
- the voices of ``drift`` appear nowhere else.

``utterances`` and ``heard`` are pure and need numpy only. ``spoken`` runs espeak-ng.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fogline_models.data import UNSTATED, Items
from fogline_models.errors import BadInput

from . import espeak

Waves = NDArray[np.float32]  # [n, 8000], one second at 8 kHz, from -1 to 1
Floats = NDArray[np.float32]
Rng = np.random.Generator

RATE_HZ = 8000
SAMPLES = 8000
PCM = 32768.0

KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
OTHER = "other"
OTHER_WORDS = (
    *("bird", "cat", "dog", "house", "tree", "bed", "six", "seven", "happy", "three"),
    *("five", "wow", "blue", "green", "door", "light", "water", "music", "time", "red"),
)
LABELS = (*KEYWORDS, OTHER)

# Variants whose speech differs from all others' and can be understood; whispers, robots and
# copies under a second name are left out.
VOICES = (
    *("adam", "anika", "antonio", "aunty", "belinda", "benjamin", "boris", "david", "ed"),
    *("edward", "f1", "f2", "f3", "f4", "f5", "grandma", "gustave", "iven", "klatt2", "klatt4"),
    *("linda", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "max", "norbert", "quincy"),
    *("rob", "steph", "Andy", "Annie"),
)
TRAINING_VOICES = 20
COMMON_VOICES = 8  # calibration and evaluation; the other 8 are drift's
ACCENTS = ("gmw/en-US", "gmw/en", "gmw/en-GB-scotland")  # American, British, Scottish
RATES = range(120, 201)  # words per minute
PITCHES = range(20, 81)  # of 0 to 99, around the voice's own

# Utterances of every split, and noisy copies of each; training is noisy anew in every epoch.
TRAINING = 2000
SELF_TEST = 16
CALIBRATION = 1000
EVALUATION, DRIFT = 400, 300
RANGES = 256  # of the training utterances
COPIES = {"ranges": 2, "self_test": 1, "calibration": 1, "evaluation": 2, "drift": 2}
SAMPLING = (
    "one noisy copy per synthetic utterance; word, voice (of 8), accent, rate, pitch and noise "
    "drawn independently and uniformly"
)

# Every set has its own stream of randomness.
SEEDS = {"ranges": 1, "self_test": 2, "calibration": 3, "evaluation": 4, "drift": 5}
SPLIT_SEED = 0

# What the microphone adds.
SNR_DB = (0.0, 20.0)  # over the word, not over the second around it
NOISE_SLOPE = (0.0, 2.0)  # power falls with this power of the frequency: white, pink, brown
LOWEST_NOISE_HZ = 30.0
MAX_HUM = 0.5  # share of the noise's power that is mains hum
MAX_ECHO = 0.5  # amplitude of the one reflection
ECHO_S = (0.01, 0.08)
LEVEL_DB = (-20.0, 0.0)  # peak of the recording, of full scale
BAND_DB = 5.0  # width of a slice
HARMONICS = 5
AT_ONCE = 256  # clips made noisy together: some 100 MB

AUDIBLE = 0.02  # of the peak: where a word begins and ends
LIBRARY = "libespeak-ng.so.1"
SPEAK_S = 300.0  # it takes a few


@dataclass(frozen=True, slots=True, order=True)
class Utterance:
    """One word as one voice says it: the identity of a clip."""

    word: str
    voice: str
    accent: str
    rate: int  # words per minute
    pitch: int

    @property
    def espeak_voice(self) -> str:
        """What espeak-ng calls the voice."""
        return f"{self.accent}+{self.voice}"

    @property
    def label(self) -> int:
        """Its place in ``LABELS``."""
        return LABELS.index(self.word if self.word in KEYWORDS else OTHER)


def make() -> Mapping[str, Items]:
    """Return every split: training clean, the others as they are heard in noise.

    Raises:
        BadInput: espeak-ng is not installed, or does not speak.
    """
    parts = utterances()
    told = [utterance for part in parts.values() for utterance in part]
    clips = dict(zip(told, spoken(told), strict=True))
    number = {utterance: scene for scene, utterance in enumerate(told)}

    def items(name: str, part: Sequence[Utterance], copies: int) -> Items:
        said = [utterance for utterance in part for _ in range(max(1, copies))]
        waves, bands = np.stack([clips[utterance] for utterance in said]), None
        if copies:
            waves, snr_db = heard(waves, np.random.default_rng(SEEDS[name]))
            bands = np.array([band(value) for value in snr_db])
        return Items(
            {"audio": waves},
            np.array([utterance.label for utterance in said]),
            np.array([number[utterance] for utterance in said]),
            bands,
            sampling=SAMPLING if name == "calibration" else UNSTATED,
        )

    parts = {**parts, "ranges": parts["training"][:RANGES]}
    return {name: items(name, part, COPIES.get(name, 0)) for name, part in parts.items()}


def utterances() -> Mapping[str, tuple[Utterance, ...]]:
    """Return what is said in every split; a pure function of the seed, and disjoint.

    Within a split every utterance is drawn independently and uniformly, except that none is
    drawn twice: of a million that there are to a voice's share, that changes nothing.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    known, common, unseen = voices()
    taken: set[Utterance] = set()
    return {
        "training": _drawn(TRAINING, known, rng, taken),
        "self_test": _drawn(SELF_TEST, known, rng, taken),
        "calibration": _drawn(CALIBRATION, common, rng, taken),
        "evaluation": _drawn(EVALUATION, common, rng, taken),
        "drift": _drawn(DRIFT, unseen, rng, taken),
    }


def voices() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the voices of training, those of calibration and evaluation, and those of drift."""
    order = np.random.default_rng(SPLIT_SEED).permutation(VOICES).tolist()
    end = TRAINING_VOICES + COMMON_VOICES
    return tuple(order[:TRAINING_VOICES]), tuple(order[TRAINING_VOICES:end]), tuple(order[end:])


def _drawn(
    count: int, voices: Sequence[str], rng: Rng, taken: set[Utterance]
) -> tuple[Utterance, ...]:
    """Draw utterances that are not ``taken`` yet; they are then."""
    found: list[Utterance] = []
    while len(found) < count:
        label = LABELS[rng.integers(len(LABELS))]
        one = Utterance(
            str(rng.choice(OTHER_WORDS)) if label == OTHER else label,
            str(rng.choice(voices)),
            str(rng.choice(ACCENTS)),
            int(rng.choice(RATES)),
            int(rng.choice(PITCHES)),
        )
        if one not in taken:
            taken.add(one)
            found.append(one)
    return tuple(found)


def spoken(said: Sequence[Utterance], library: str = LIBRARY) -> Waves:
    """Return the clean clips ``[n, 8000]``: the word from the first sample on, then silence.

    The same utterances in the same order give the same samples, to the bit.

    Raises:
        BadInput: espeak-ng is not installed, or does not speak.
    """
    orders = "".join(f"{one.espeak_voice}\t{one.rate}\t{one.pitch}\t{one.word}\n" for one in said)
    command = [sys.executable, espeak.__file__, library]
    ran = subprocess.run(command, input=orders.encode(), capture_output=True, timeout=SPEAK_S)
    if ran.returncode:
        lines = ran.stderr.decode(errors="replace").split("\n")
        raise BadInput(f"data: {'; '.join(lines).strip('; ') or f'exit status {ran.returncode}'}")
    clips, rest = np.zeros((len(said), SAMPLES), np.float32), memoryview(ran.stdout)
    for clip in clips:
        end = 4 + 2 * int.from_bytes(rest[:4], "little")
        word = _cut(np.frombuffer(rest[4:end], "<i2") / PCM)
        clip[: len(word)] = word
        rest = rest[end:]
    return clips


def _cut(wave: NDArray[np.float64]) -> Waves:
    """Return one word at 8 kHz, from where it is heard first to where it is heard last."""
    from scipy.signal import resample_poly  # comes with scikit-learn

    wave = resample_poly(wave, RATE_HZ // 50, espeak.RATE_HZ // 50)
    loud = np.flatnonzero(np.abs(wave) > AUDIBLE * np.abs(wave).max())
    return _as_pcm(wave[loud[0] : loud[-1] + 1][:SAMPLES])


def heard(clips: Waves, rng: Rng, max_stretch: float = 0.0) -> tuple[Waves, Floats]:
    """Return clean clips as a cheap microphone hears them, and the SNR of each in dB.

    The word begins anywhere in the second, is reflected once, and is drowned by noise of some
    color and by mains hum; then everything is made as loud as it happens to be.

    Args:
        clips: ``[n, 8000]``, as ``spoken`` returns them.
        rng: what all that is drawn from.
        max_stretch: by how much a word is drawn out or sped up at most, pitch and formants with
            it; as if there were more voices than there are, for training only.
    """
    parts = [
        _heard(clips[start : start + AT_ONCE], rng, max_stretch)
        for start in range(0, len(clips), AT_ONCE)
    ]
    return np.concatenate([part for part, _ in parts]), np.concatenate([snr for _, snr in parts])


def _heard(clips: Waves, rng: Rng, max_stretch: float) -> tuple[Waves, Floats]:
    count = len(clips)

    def drawn(low: float, high: float) -> Floats:
        return rng.uniform(low, high, (count, 1)).astype(np.float32)

    pace = np.exp(drawn(-max_stretch, max_stretch))
    length = (SAMPLES - (clips[:, ::-1] != 0).argmax(axis=1)[:, None]).astype(np.float32)
    heard_for = np.minimum(np.ceil(length / pace), SAMPLES)
    start = np.floor(drawn(0, 1) * (SAMPLES - heard_for + 1))
    source = (np.arange(SAMPLES, dtype=np.float32) - start) * pace
    speech = _read(clips, source)
    power = (speech**2).sum(axis=1, keepdims=True) / heard_for
    speech += drawn(0, MAX_ECHO) * _read(clips, source - drawn(*ECHO_S) * RATE_HZ)

    snr_db = drawn(*SNR_DB)
    noise = _noise(drawn(*NOISE_SLOPE), drawn(0, MAX_HUM), rng)
    mixed = speech + noise * np.sqrt(power / 10 ** (snr_db / 10))
    level = 10 ** (drawn(*LEVEL_DB) / 20)
    mixed *= level / np.abs(mixed).max(axis=1, keepdims=True)
    return mixed, snr_db[:, 0]


def band(snr_db: float) -> str:
    """Return the slice that an SNR belongs to."""
    low = int(snr_db // BAND_DB * BAND_DB)
    return f"{low:+d} to {low + BAND_DB:+.0f} dB"


def _read(clips: Waves, at: Floats) -> Waves:
    """Return every clip at positions ``[n, 8000]`` between its samples, silence outside it."""
    padded = np.pad(clips, ((0, 0), (1, 2)))  # silence before the first sample and after the last
    at = np.clip(at + 1, 0, SAMPLES + 1)
    low = at.astype(np.int64)
    found = np.take_along_axis(padded, low, axis=1)
    found += (at - low).astype(np.float32) * (np.take_along_axis(padded, low + 1, axis=1) - found)
    return found


def _noise(slope: Floats, hum: Floats, rng: Rng) -> Waves:
    """Return noise ``[n, 8000]`` of power 1.

    Args:
        slope: ``[n, 1]``, how steeply the power falls with the frequency.
        hum: ``[n, 1]``, the share of the power that is hum of 50 or 60 Hz and its harmonics.
        rng: what all else is drawn from.
    """
    count = len(slope)
    frequency = np.arange(SAMPLES // 2 + 1, dtype=np.float32) * (RATE_HZ / SAMPLES)  # 1 Hz apart
    color = np.exp(-slope / 2 * np.log(np.maximum(frequency / LOWEST_NOISE_HZ, 1)))
    white = rng.standard_normal((count, 2 * len(frequency)), np.float32).view(np.complex64)
    spectrum = _of_power_1(white * color) * np.sqrt(1 - hum)
    lines = rng.choice((50, 60), (count, 1)) * np.arange(1, HARMONICS + 1)
    waves = np.exp(2j * np.pi * rng.uniform(size=lines.shape)) / np.arange(1, HARMONICS + 1)
    spectrum[np.arange(count)[:, None], lines] += _of_power_1(waves) * np.sqrt(hum)
    return np.fft.irfft(spectrum, SAMPLES).astype(np.float32)


def _of_power_1(spectrum: NDArray[Any]) -> NDArray[Any]:
    """Scale one-sided spectra ``[n, ...]`` so that their waves have mean square 1 (Parseval)."""
    total = 2 * (np.abs(spectrum) ** 2).sum(axis=1, keepdims=True)
    scaled: NDArray[Any] = spectrum * (SAMPLES / np.sqrt(total))
    return scaled


def _as_pcm(waves: NDArray[np.float64]) -> Waves:
    """Return waves in the steps of 16 bits in which microphones deliver them."""
    return (np.clip(np.round(waves * PCM), -PCM, PCM - 1) / PCM).astype(np.float32)
