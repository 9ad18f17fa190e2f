"""Compression attached to the modules of a model while it is trained."""
