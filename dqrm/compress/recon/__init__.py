"""Layer-wise reconstruction: a compressed layer is made to answer as the original one does."""
