"""The packed model file and predictions from it."""
