"""Learning from a teacher: losses between two models' outputs, and maps between their layers."""
