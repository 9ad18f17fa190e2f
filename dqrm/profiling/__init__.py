"""Where a model's parameters, arithmetic, bytes and time are, module by module."""
