"""Compressed models as they are stored and run: packed weights, their files, integer layers.

Nothing but ``hf`` knows a library of models, and ``shapes`` how its encoders are built.
"""
