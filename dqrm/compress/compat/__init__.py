"""Settings of other systems, read as ours."""
