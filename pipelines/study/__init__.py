"""What compression costs transformers: every shipped recipe on GLUE's tasks, over seeds.

``tasks`` says what the tasks are, ``merge`` makes one pipeline of the recipes for a task and a
seed, ``run`` runs those that are not complete and reads what they measured, ``table`` compares it
and ``plots`` draws it.
"""
