"""The DLRM network and its embedding collection."""
