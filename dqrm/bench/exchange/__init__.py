"""Exchange of gradients between real processes: rows, small messages and whole steps."""
