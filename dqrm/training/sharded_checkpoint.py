"""Checkpoints of tables that ranks share out, in the format of those of a single process.

Rank 0 writes the files; rows come to it some at a time, so that it never holds more than a few
megabytes of what is not its own. Whoever reads such a file, any number of ranks or one process,
cannot tell how it was written.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dqrm.models.dlrm import DLRM
from dqrm.models.embedding import ROWS_AT_ONCE, EmbeddingBagCollection
from dqrm.models.placement import Piece
from dqrm.models.sharded import ShardedEmbeddingBags
from dqrm.training.sharded_optimizer import ShardedOptimizer
from dqrm.training.world import World

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


Lines = Callable[[EmbeddingBagCollection], Tensor]
"""Returns what a collection has of a tensor that has a line for each row of the tables."""


def gather_model(path: Path | None, model: DLRM, bags: ShardedEmbeddingBags, world: World) -> None:
    """Write ``model.safetensors``; every rank calls this.

    Args:
        path: to write, on rank 0; None on the others.
        model: this rank's part.
        bags: its tables.
        world: of the ranks.
    """
    from torch import distributed

    scales = torch.zeros(len(bags.tables))
    for part in bags.held():
        scales[part.table] = part.collection.table_scale[part.number]
    # Of a table in pieces, each rank knows the scale of its own.
    distributed.all_reduce(scales, distributed.ReduceOp.MAX)
    tensors = {n: t for n, t in model.state_dict().items() if not n.startswith("emb_l.")}
    of_tables = bags.owned.state_dict(prefix="emb_l.")
    tensors |= of_tables | {"emb_l.table_scale": scales}
    del tensors["emb_l.weight"]
    _write(path, tensors, {"emb_l.weight": lambda part: part.weight.detach()}, bags, world)


def gather_optimizer(
    path: Path | None, optimizer: ShardedOptimizer, others: Mapping[str, Tensor], world: World
) -> None:
    """Write ``optimizer.safetensors``; every rank calls this.

    Args:
        path: to write, on rank 0; None on the others.
        optimizer: of this rank's part.
        others: further tensors for the file, rank 0's.
        world: of the ranks.
    """
    states = optimizer.row_states()

    def lines_of(name: str) -> Lines:
        return lambda collection: states[collection][name]

    tensors = {**optimizer.dense_state(), **others}
    lines: dict[str, Lines] = {}
    for name, tensor in states[optimizer.bags.owned].items():
        if tensor.dim():
            lines[f"rows.{name}"] = lines_of(name)
        else:
            tensors[f"rows.{name}"] = tensor
    _write(path, tensors, lines, optimizer.bags, world)


def send_checkpoint(model: DLRM, optimizer: ShardedOptimizer, world: World) -> None:
    """Give rank 0 what it needs for a checkpoint; the other ranks call this."""
    gather_model(None, model, optimizer.bags, world)
    gather_optimizer(None, optimizer, {}, world)


def _write(
    path: Path | None,
    tensors: Mapping[str, Tensor],
    lines: Mapping[str, Lines],
    bags: ShardedEmbeddingBags,
    world: World,
) -> None:
    """Write tensors and, as they come in, those that have a line for each row."""
    if path is None:
        for of in lines.values():
            for _ in _gathered(of, bags, world):
                pass
        return
    header: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        header[name], end = _entry(tensor.dtype, list(tensor.shape), end)
    for name, of in lines.items():
        own = of(bags.owned)
        header[name], end = _entry(own.dtype, [bags.num_rows, *own.shape[1:]], end)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(_bytes_of(tensor).numpy().data)
        for of in lines.values():
            for block in _gathered(of, bags, world):
                file.write(_bytes_of(block).numpy().data)


def _entry(dtype: torch.dtype, shape: list[int], begin: int) -> tuple[dict[str, object], int]:
    """Return what the header of a safetensors file says of a tensor, and where it ends."""
    end = begin + math.prod(shape) * dtype.itemsize
    return {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}, end


def _gathered(of: Lines, bags: ShardedEmbeddingBags, world: World) -> Iterator[Tensor]:
    """Yield on rank 0 the lines of all rows in their order, some at a time; send them on others."""
    from torch import distributed

    held = {(part.table, part.first_row): part for part in bags.held()}
    example = of(bags.owned)
    for table, info in enumerate(bags.tables):
        pieces = bags.placement.of_table(table) or (Piece(table, 0, info.num_rows, 0),)
        for piece in pieces:
            part = held.get((table, piece.first_row))
            for begin in range(0, piece.num_rows, ROWS_AT_ONCE):
                count = min(ROWS_AT_ONCE, piece.num_rows - begin)
                if world.rank == piece.rank:
                    assert part is not None
                    start = part.here.start + begin
                    block = of(part.collection)[start : start + count]
                    if world.is_main:
                        yield block
                    else:
                        distributed.send(_bytes_of(block), 0)
                elif world.is_main:
                    block = torch.empty(count, *example.shape[1:], dtype=example.dtype)
                    distributed.recv(_bytes_of(block), piece.rank)
                    yield block


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
