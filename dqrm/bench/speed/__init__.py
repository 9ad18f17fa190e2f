"""Our loops and steps beside those of other libraries, in turn, in one process."""
