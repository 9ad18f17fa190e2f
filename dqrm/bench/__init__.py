"""Studies of accuracy and speed, run as commands; their results carry versions and settings."""
