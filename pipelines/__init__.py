"""Pipelines built from the parts of dqrm."""
