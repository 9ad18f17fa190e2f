"""The dqrm command."""
