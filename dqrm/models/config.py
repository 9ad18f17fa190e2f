"""Shape of the DLRM network."""

from typing import Literal

from pydantic import Field, PositiveInt

from dqrm.settings import Settings


class ModelConfig(Settings):
    """Bottom MLP, embedding tables, pairwise interaction, top MLP."""

    embedding_dim: PositiveInt = 16
    """Width of every embedding row and of the bottom MLP's output."""

    bottom_mlp: tuple[PositiveInt, ...] = (512, 256, 64)
    """Hidden widths of the bottom MLP; its last layer, of width embedding_dim, is added."""

    top_mlp: tuple[PositiveInt, ...] = (512, 256)
    """Hidden widths of the top MLP; its last layer, of width 1, is added."""

    interaction: Literal["dot", "cat"] = "dot"
    """dot: inner product of every pair of feature vectors; cat: the vectors side by side."""

    interaction_itself: bool = False
    """Whether dot also takes each vector's product with itself."""

    pooling: Literal["sum", "mean"] = "sum"
    """How the rows of a multi-hot bag become one vector."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of zeroing a hidden unit of the top MLP in training."""
