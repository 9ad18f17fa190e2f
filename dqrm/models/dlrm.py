"""The deep learning recommendation model (arXiv 1906.00091).

    dense [B, num_dense] --- bot_l ---+
                                      +--- interaction --- top_l --- logit [B]
    indices, offsets ------- emb_l ---+

Parts are named and initialised as in facebookresearch/dlrm: ``bot_l``, ``emb_l``, ``top_l``.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dqrm.compress.config import QuantConfig
from dqrm.compress.linear import QuantLinear
from dqrm.models.config import ModelConfig
from dqrm.models.embedding import EmbeddingBagCollection, Table
from dqrm.models.interaction import ConcatInteraction, DotInteraction
from dqrm.models.placement import Placement
from dqrm.models.sharded import ShardedEmbeddingBags


class DLRM(nn.Module):
    """Bottom MLP, embedding bags, interaction and top MLP.

    Args:
        bot_l: maps [B, num_dense] to [B, D].
        emb_l: maps (indices, offsets) to [B, T, D].
        interaction: maps ([B, D], [B, T, D]) to [B, K].
        top_l: maps [B, K] to [B, 1].
    """

    def __init__(
        self, bot_l: nn.Sequential, emb_l: nn.Module, interaction: nn.Module, top_l: nn.Sequential
    ) -> None:
        super().__init__()
        self.bot_l = bot_l
        self.emb_l = emb_l
        self.interaction = interaction
        self.top_l = top_l

    def forward(self, dense: Tensor, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return the logit of the label, [B]; its sigmoid is the probability.

        Args:
            dense: float32 [B, num_dense].
            indices: int32 or int64 [N], table-major (see EmbeddingBagCollection).
            offsets: int64 [T * B + 1], or None for one id a bag.
        """
        pooled = self.emb_l(indices, offsets)
        mixed = self.interaction(self.bot_l(dense), pooled)
        logit: Tensor = self.top_l(mixed)
        return logit.squeeze(1)


def table_bits(names: Sequence[str], quant: QuantConfig) -> list[int]:
    """Return the bits of each table; ``quant.table_bits`` may name tables only."""
    unknown = sorted(set(quant.table_bits) - set(names))
    if unknown:
        raise ValueError(
            f"quant.table_bits names {', '.join(unknown)}, but the data set's tables are "
            f"{', '.join(names)}"
        )
    return [quant.table_bits.get(name, quant.bits) for name in names]


def build_dlrm(
    model: ModelConfig,
    quant: QuantConfig,
    *,
    num_dense: int,
    tables: Sequence[tuple[str, int]],
    placement: Placement | None = None,
    rank: int = 0,
) -> DLRM:
    """Return a freshly initialised model for a data set.

    Args:
        model: shape of the network.
        quant: what is trained on which grid.
        num_dense: dense columns of the data set.
        tables: name and rows of each table, in the order of the batch.
        placement: of the tables, where ranks share them out; each builds its part.
        rank: of this process.
    """
    bits = table_bits([name for name, _ in tables], quant)
    make_bags = (
        EmbeddingBagCollection
        if placement is None
        else partial(ShardedEmbeddingBags, placement=placement, rank=rank)
    )
    emb_l = make_bags(
        [Table(name, rows, b) for (name, rows), b in zip(tables, bits, strict=True)],
        model.embedding_dim,
        pooling=model.pooling,
        granularity=quant.granularity,
        scale_period=quant.scale_period,
        ste=quant.ste,
        storage=quant.storage,
    )
    bot_l = build_mlp(
        [num_dense, *model.bottom_mlp, model.embedding_dim],
        quant.mlp_bits,
        exempt=0 if quant.skip_first_layer else None,
        final_relu=True,
        activation_bits=quant.activation_bits,
    )
    top_l = build_mlp(
        [interaction_width(model, len(tables)), *model.top_mlp, 1],
        quant.mlp_bits,
        exempt=len(model.top_mlp) if quant.skip_last_layer else None,
        dropout=model.dropout,
        activation_bits=quant.activation_bits,
    )
    return DLRM(bot_l, emb_l, build_interaction(model, len(tables)), top_l)


def interaction_width(model: ModelConfig, num_tables: int) -> int:
    """Return the width of the interaction's output, the top MLP's input."""
    vectors = num_tables + 1
    if model.interaction == "cat":
        return vectors * model.embedding_dim
    pairs = vectors * (vectors + (1 if model.interaction_itself else -1)) // 2
    return model.embedding_dim + pairs


def build_interaction(model: ModelConfig, num_tables: int) -> nn.Module:
    """Return the interaction of ``num_tables`` pooled embeddings and the dense vector."""
    if model.interaction == "cat":
        return ConcatInteraction()
    return DotInteraction(num_tables + 1, itself=model.interaction_itself)


def build_mlp(
    widths: Sequence[int],
    bits: int,
    *,
    exempt: int | None = None,
    final_relu: bool = False,
    dropout: float = 0.0,
    activation_bits: int = 32,
) -> nn.Sequential:
    """Return linear layers with ReLU between them.

    Weights are drawn from N(0, 2/(in+out)) and biases from N(0, 1/out) (variances).

    Args:
        widths: input width, hidden widths, output width.
        bits: bits of the weights; 32 does not quantize.
        exempt: layer left in FP32, if any.
        final_relu: whether a ReLU follows the last layer.
        dropout: probability of zeroing a hidden unit.
        activation_bits: bits of the inputs of layers with quantized weights.
    """
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for position, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        linear = (
            nn.Linear(fan_in, fan_out)
            if bits == 32 or position == exempt
            else QuantLinear(fan_in, fan_out, bits, activation_bits)
        )
        with torch.no_grad():
            linear.weight.normal_(0.0, math.sqrt(2.0 / (fan_in + fan_out)))
            linear.bias.normal_(0.0, math.sqrt(1.0 / fan_out))
        layers.append(linear)
        if position != last:
            # Dropout shares the activation's place, so that layers keep the reference's numbers.
            relu = nn.ReLU()
            layers.append(nn.Sequential(relu, nn.Dropout(dropout)) if dropout else relu)
        elif final_relu:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
