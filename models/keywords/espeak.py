"""Says words with espeak-ng's library, in a process that does nothing else.

    python espeak.py libespeak-ng.so.1  < orders  > samples

An order is a line `gmw/en-US+f2<tab>160<tab>50<tab>yes`: voice, words per minute, pitch, word. Each is
answered with the number of samples, as uint32, and the samples, as int16, little-endian.

The library takes a millisecond per word where its program takes a process each, but
it keeps the phase of its oscillators from word to word: so the same orders give the same
samples in a fresh process only.
"""

import ctypes
import sys
from collections.abc import Iterator

RATE_HZ = 22050  # of the samples, for all voices used here
ABSENT = (
    "the speech of this family is synthesized by espeak-ng, which is not installed: "
    "apt-get install espeak-ng (building needs it, nothing else does)"
)

# Of speak_lib.h.
_SYNCHRONOUS = 2  # hand samples to a callback before espeak_Synth returns
_WORDS_PER_MINUTE, _PITCH = 1, 3
_BY_CHARACTER, _UTF8 = 1, 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


def say(library: str, orders: Iterator[str]) -> Iterator[bytes]:
    """Yield the samples of every order.

    Raises:
        SystemExit: there is no such library, or it refuses an order; the message says which.
    """
    try:
        espeak = ctypes.CDLL(library)
    except OSError:
        sys.exit(ABSENT)
    heard: list[bytes] = []

    def hear(samples: int | None, count: int, _events: int | None) -> int:
        if samples:  # the last call for a word brings none
            heard.append(ctypes.string_at(samples, 2 * count))
        return 0

    if espeak.espeak_Initialize(_SYNCHRONOUS, 0, None, 0) != RATE_HZ:
        sys.exit("espeak-ng is installed, but not its voices: apt-get install espeak-ng-data")
    callback = _CALLBACK(hear)  # held on to for as long as it is called
    espeak.espeak_SetSynthCallback(callback)
    for order in orders:
        voice, rate, pitch, word = order.rstrip("\n").split("\t")
        heard.clear()
        text = word.encode() + b"\0"
        failed = (
            espeak.espeak_SetVoiceByName(voice.encode())
            or espeak.espeak_SetParameter(_WORDS_PER_MINUTE, int(rate), 0)
            or espeak.espeak_SetParameter(_PITCH, int(pitch), 0)
            or espeak.espeak_Synth(text, len(text), 0, _BY_CHARACTER, 0, _UTF8, None, None)
            or espeak.espeak_Synchronize()
        )
        samples = b"".join(heard)
        if failed or not samples:
            sys.exit(f"espeak-ng does not say {word!r} as {voice} (its error {failed})")
        yield samples


if __name__ == "__main__":
    for spoken in say(sys.argv[1], iter(sys.stdin)):
        sys.stdout.buffer.write((len(spoken) // 2).to_bytes(4, "little") + spoken)
