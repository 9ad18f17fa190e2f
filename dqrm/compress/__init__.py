"""Quantization grids and the modules that train on them."""
