"""The demo family: handwritten digits, an edge net and the hub net that it escalates to.

    data.py     which digit belongs to which split, and the cheap scanner that items come from
    nets.py     the two architectures and how they are trained
    recipe.py   what ``fogline-models build digits`` does, step by step

What it produces is committed beside it: ``bundles/``, ``calibration.npz``, ``traffic.npz``,
``splits.json``. README.md tells what they hold and what they are worth.
"""
