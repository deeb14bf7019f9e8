"""The demo family: handwritten digits, an edge net and the hub net that it escalates to.

    recipe.toml   what ``fogline-models build digits`` makes
    data.py       which digit belongs to which split, and the cheap scanner that items come from
    nets.py       the two architectures and how they are trained

What it produces is committed beside it: ``bundles/``, ``calibration.npz``, ``traffic.npz``,
``drift.npz``, ``splits.json``. README.md tells what they hold and what they are worth.
"""
