"""Native loops and their plain twins: parsing of delimited text, hashing, dictionary encoding."""
