"""Training across machines that are network namespaces of this one."""
