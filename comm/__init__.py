"""Exchange between processes: which collective backends this machine can use."""
