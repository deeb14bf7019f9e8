"""The family of text: which kind of file a snippet was cut from, at the edge and on the hub.

    recipe.toml   what ``fogline-models build phrases`` makes
    data.py       where snippets come from (the files of this machine) and which split has which
    nets.py       the tokenizer, the two nets, and how they are trained through transformers

Nothing of what it produces is committed: it is made anew from the packages that are installed.
README.md tells what it is worth, and how an application makes tokens of its text.
"""
