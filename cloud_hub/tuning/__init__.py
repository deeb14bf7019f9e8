"""Which batch, how many instances and threads suit a model on this machine: measured, not guessed.

choice.py       which settings to try, when to stop, which to take (pure)
measure.py      runs them on the engines that serve, behind the batcher that serves
tune.py         from a model to its choice: the order of it all
settings.py     the model that is meant, and its ``config.pbtxt`` before and after
report.py       what the operator sees: progress, curve, choice
"""
