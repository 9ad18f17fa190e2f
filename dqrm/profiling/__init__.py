"""Where a model's parameters, multiplications and time are, module by module."""
