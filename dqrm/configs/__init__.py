"""Configurations that start runs."""
