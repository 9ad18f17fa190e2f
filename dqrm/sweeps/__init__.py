"""Search for configuration values: every trial is a training run, selected on validation."""
