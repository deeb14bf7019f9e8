"""Keyword spotting on synthetic speech: a tiny edge net and the hub net that it escalates to.

    recipe.toml   what ``fogline-models build keywords`` makes
    data.py       which utterance belongs to which split, and the noise in which it is heard
    espeak.py     says words with espeak-ng, in a process of its own
    log_mel.py    the constant kernels of the front end, from waves to what ears tell apart
    nets.py       that front end as part of the graph, the two nets, and how they are trained

Nothing it produces is committed. README.md tells what it is worth, and that all of it is
synthetic: speech from a formant synthesizer, which says nothing about human speech.
"""
