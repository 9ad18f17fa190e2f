"""The order in which training rows are visited: new every epoch, exact to restart."""

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]

BLOCK_ROWS = 4096
"""Consecutive rows read together: one column of a block is 16 KiB, four pages of a file."""

_BLOCKS_STREAM = 0
_WINDOW_STREAM = 1


class RowOrder:
    """Every row once, in an order fixed by (num_rows, seed, epoch, window_rows).

    Rows are cut into blocks of consecutive rows. The blocks are shuffled; each `window_rows` of
    them are a window, and the rows of a window are shuffled among themselves::

        blocks as stored     [0 1 2][3 4 5][6 7 8][9 10 11]
        blocks shuffled      [9 10 11][3 4 5] | [0 1 2][6 7 8]      two blocks a window
        rows of each window   4 9 10 3 5 11   |  8 0 6 2 7 1

    A reader holds one window, so memory is bounded by `window_rows`; when all rows fit into one
    window, the shuffle is a uniform one.

    The random source is Philox4x64-10 (Salmon et al., SC'11) with key (seed, epoch) and a counter
    that names the block shuffle or the window. NumPy fixes the output of its bit generators for
    all versions (NEP 19), and nothing else of its random module is used. Any window's order is
    found without the windows before it.
    """

    def __init__(self, num_rows: int, seed: int, epoch: int, window_rows: int = 1 << 20) -> None:
        """Fix the order; `num_rows` >= 0, `window_rows` >= 1, `seed` and `epoch` below 2^64."""
        if num_rows < 0 or window_rows < 1:
            raise ValueError(
                f"num_rows={num_rows}, window_rows={window_rows}: num_rows must be 0 or more and "
                "window_rows 1 or more"
            )
        if not (0 <= seed < 2**64 and 0 <= epoch < 2**64):
            raise ValueError(f"seed={seed}, epoch={epoch}: both must be from 0 to 2^64 - 1")
        self.num_rows = num_rows
        self.seed = seed
        self.epoch = epoch
        self.window_rows = window_rows
        # Sixteen blocks to a window at least, so that small windows still mix distant rows.
        self.block_rows = max(1, min(BLOCK_ROWS, window_rows // 16))
        self._blocks_per_window = max(1, window_rows // self.block_rows)
        num_blocks = -(-num_rows // self.block_rows)
        self._blocks = self._permutation(num_blocks, _BLOCKS_STREAM, 0)
        sizes = np.full(num_blocks, self.block_rows, np.int64)
        # Only the last block as stored may be short; it can stand anywhere in the order.
        sizes[self._blocks == num_blocks - 1] = num_rows - self.block_rows * (num_blocks - 1)
        ends = np.concatenate([[0], np.cumsum(sizes)])
        self.window_starts: I64 = np.append(ends[: -1 : self._blocks_per_window], num_rows)
        """[num_windows + 1]: place in the order of each window's first row, then num_rows."""

    @property
    def num_windows(self) -> int:
        """Windows in an epoch."""
        return len(self.window_starts) - 1

    def runs(self, window: int) -> list[tuple[int, int]]:
        """Row ranges (start, stop) of the window's blocks, in the order they are to be read."""
        first = window * self._blocks_per_window
        blocks = self._blocks[first : first + self._blocks_per_window]
        starts = blocks * self.block_rows
        stops = np.minimum(starts + self.block_rows, self.num_rows)
        return list(zip(starts.tolist(), stops.tolist(), strict=True))

    def shuffle(self, window: int) -> I64 | None:
        """[rows of the window]: visit the row read at place shuffle[0] first, and so on."""
        size = int(self.window_starts[window + 1] - self.window_starts[window])
        return self._permutation(size, _WINDOW_STREAM, window)

    def _permutation(self, size: int, stream: int, number: int) -> I64:
        # Sort random words that carry their own index in the low bits: all differ, so every sort
        # algorithm agrees, and sorting the words is faster than an argsort.
        # As arrays: a list with a number of 2^63 or more would pass through float64.
        key = np.array([self.seed, self.epoch], np.uint64)
        counter = np.array([0, stream, number, 0], np.uint64)
        philox = np.random.Philox(key=key, counter=counter)
        words = philox.random_raw(size)
        low = np.uint64((1 << max(size - 1, 1).bit_length()) - 1)
        words &= ~low
        words |= np.arange(size, dtype=np.uint64)
        words.sort()
        words &= low
        return words.view(np.int64)


class FileOrder:
    """Every row once, as stored: for validation, test and unshuffled training."""

    def __init__(self, num_rows: int, window_rows: int = 1 << 18) -> None:
        """Windows of `window_rows` consecutive rows."""
        self.num_rows = num_rows
        starts = range(0, num_rows, window_rows)
        self.window_starts: I64 = np.array([*starts, num_rows], np.int64)
        """[num_windows + 1]: first row of each window, then num_rows."""

    @property
    def num_windows(self) -> int:
        """Windows in a pass."""
        return len(self.window_starts) - 1

    def runs(self, window: int) -> list[tuple[int, int]]:
        """The one row range of the window."""
        return [(int(self.window_starts[window]), int(self.window_starts[window + 1]))]

    def shuffle(self, window: int) -> I64 | None:
        """None: rows are visited as they are read."""
        del window
        return None
