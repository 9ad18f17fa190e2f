"""The teacher behind generated data: draws rows and the true probability of each label.

n rows, D dense columns, T tables, K latent width. Every random number is a function of
(seed, chunk) or of (seed, table, id), so a chunk of rows needs no other chunk and an id means the
same in every row without a stored table of effects.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from dqrm.data.rows import F32, I32, I64, Lists, Rows

F64 = npt.NDArray[np.float64]
U64 = npt.NDArray[np.uint64]

LATENT_WIDTH = 3
"""K, the rank of the interactions: an id's linear effect and K latents take 16 bits each, so that
one 64-bit hash of the id holds them all."""

CHUNK_ROWS = 1 << 16
"""Rows drawn together; also the pilot sample the logit is calibrated on."""

QUANTILE_STEP = 16
"""The logit is calibrated on every 16th of the sorted pilot rows, which takes a tenth of a
second in place of two."""

DENSE_MISSING = (0.45, 0.0, 0.2, 0.2, 0.03, 0.22, 0.04, 0.0, 0.04, 0.45, 0.04, 0.77, 0.2)
"""Share of empty fields by dense column, about as in the Criteo Kaggle data."""

_SHARES = {"linear": 0.4, "pairs": 0.35, "dense": 0.25}
"""Part of the logit's variance from single ids, from pairs of columns and from dense columns."""

_DENSE_SPREAD = 1.5
"""Standard deviation of a dense count's logarithm: counts reach from 0 to thousands."""

_WEIGHTS, _PILOT, _ROWS = range(3)
"""Streams of the generator."""

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
"""SplitMix64 (Steele, Lea and Flood 2014)."""

_NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(65536)], np.float32)
"""Quantiles of the standard normal: 16 random bits pick one."""


class Teacher:
    """Zipf ids, log-normal counts, and a label that follows a factorization machine.

    logit = bias + slope * (linear + pairs + dense), where
        linear = sum over tables of weight_t * effect(t, id)
        pairs  = sum over pairs of columns of <latent, latent>, the dense columns counting as one
        dense  = a weighted sum of the dense columns' standardised logarithms
    Each of the three has its fixed share of the variance. slope and bias are solved for so that
    the best possible AUC and the positive rate are the ones asked for.
    """

    def __init__(
        self,
        table_rows: Sequence[int],
        *,
        seed: int,
        zipf: float,
        bayes_auc: float,
        positive_rate: float,
        multi_hot: Sequence[bool],
        max_bag: int,
    ) -> None:
        """Draw the weights and calibrate the logit on `CHUNK_ROWS` rows of their own.

        table_rows: ids of each table, from 0 (the most frequent) up. multi_hot: tables whose rows
        hold 0 to `max_bag` ids, uniformly.
        """
        self._seed = seed
        self._table_rows = tuple(table_rows)
        self._zipf = zipf
        self._multi_hot = tuple(multi_hot)
        self._max_bag = max_bag
        num_tables, num_dense = len(self._table_rows), len(DENSE_MISSING)
        draws = _normals(self._words(_WEIGHTS, 0, 0, 64))[: 2 * num_tables]
        # Log-normal weights: some columns matter more than others.
        self._linear_weight: F32 = np.exp(0.5 * draws[:num_tables])
        self._latent_weight: F32 = np.exp(0.5 * draws[num_tables:])
        draws = _normals(self._words(_WEIGHTS, 1, 0, 64))
        self._dense_weight: F32 = draws[:num_dense]
        self._dense_latent: F32 = draws[num_dense : num_dense * (1 + LATENT_WIDTH)].reshape(
            LATENT_WIDTH, num_dense
        ) / np.sqrt(np.float32(num_dense))
        self._dense_log_mean: F32 = 1.0 + draws[-num_dense:]
        _, parts = self._draw(_PILOT, 0)
        self._centre = {name: float(part.mean()) for name, part in parts.items()}
        self._factor = {
            name: float(np.sqrt(_SHARES[name]) / part.std()) for name, part in parts.items()
        }
        self._slope, self._bias = _calibrate(self._sum(parts), bayes_auc, positive_rate)

    def chunk(
        self, number: int, present: Callable[[I32], I32] = lambda ids: ids
    ) -> tuple[Rows, F64]:
        """Rows [CHUNK_ROWS] of a chunk and the true probability of each label.

        present: ids that rows hold in place of those that are drawn.
        """
        rows, parts = self._draw(_ROWS, number, present)
        probability = _sigmoid(self._slope * self._sum(parts) + self._bias)
        chance = _uniforms(self._words(_ROWS, number, 2, CHUNK_ROWS // 2))
        rows.label[:] = chance < probability
        return rows, probability

    def _draw(
        self, stream: int, number: int, present: Callable[[I32], I32] = lambda ids: ids
    ) -> tuple[Rows, dict[str, F64]]:
        """Rows with their labels unset, and the three parts of the logit before scaling."""
        n = CHUNK_ROWS
        dense, signal = self._dense(stream, number)
        words = self._words(stream, number, 1, len(self._table_rows) * n // 2)
        uniforms = _uniforms(words).reshape(-1, n)
        latent = self._dense_latent @ signal
        squares = np.square(latent).sum(axis=0)
        linear = np.zeros(n, np.float32)
        one_hot, lists = [], []
        for t, size in enumerate(self._table_rows):
            if self._multi_hot[t]:
                bags = self._bags(stream, number, t)
                bags = Lists(bags.offsets, present(bags.ids))
                effects = _sum_bags(self._effects(t, bags.ids), bags.offsets)
                effects /= np.sqrt(np.float32(self._max_bag / 2))
                lists.append(bags)
            else:
                ids = present(zipf_ids(uniforms[t], size, self._zipf))
                effects = self._effects(t, ids)
                one_hot.append(ids)
            linear += self._linear_weight[t] * effects[0]
            pull = self._latent_weight[t] * effects[1:]
            latent += pull
            squares += np.square(pull).sum(axis=0)
        # The sum over pairs, from the square of the sum (Rendle 2010, lemma 3.1).
        pairs = (np.square(latent).sum(axis=0) - squares) / 2
        ids_matrix = np.stack(one_hot) if one_hot else np.empty((0, n), np.int32)
        rows = Rows(np.empty(n, np.float32), dense, ids_matrix, tuple(lists))
        parts = {"linear": linear, "pairs": pairs, "dense": self._dense_weight @ signal}
        return rows, {name: part.astype(np.float64) for name, part in parts.items()}

    def _dense(self, stream: int, number: int) -> tuple[F32, F32]:
        """log(1 + count) as a reader prepares it, and the standardised logarithm behind it."""
        num_dense = len(DENSE_MISSING)
        words = self._words(stream, number, 0, num_dense * CHUNK_ROWS // 2)
        bits = words.view("<u2").reshape(2, num_dense, CHUNK_ROWS)
        signal = _NORMAL[bits[0]]
        counts = np.floor(np.exp(_DENSE_SPREAD * signal + self._dense_log_mean[:, None]))
        missing = bits[1] < (np.array(DENSE_MISSING) * 65536)[:, None]
        counts[missing] = 0.0
        signal[missing] = 0.0
        return np.log1p(counts), signal

    def _bags(self, stream: int, number: int, table: int) -> Lists:
        """A list of 0 to max_bag ids for each row."""
        lengths = self._words(stream, number, 3 + 2 * table, CHUNK_ROWS) >> np.uint64(33)
        offsets = np.zeros(CHUNK_ROWS + 1, np.int64)
        np.cumsum(lengths * np.uint64(self._max_bag + 1) >> np.uint64(31), out=offsets[1:])
        total = int(offsets[-1])
        uniforms = _uniforms(self._words(stream, number, 4 + 2 * table, -(-total // 2)))[:total]
        return Lists(offsets, zipf_ids(uniforms, self._table_rows[table], self._zipf))

    def _effects(self, table: int, ids: I32) -> F32:
        """[1 + K, len(ids)] standard normals: an id's linear effect and its latents."""
        state = (self._seed * (table + 1) + (table + 1) * _GOLDEN) % 2**64
        words = ids.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(state)
        return np.ascontiguousarray(_normals(_mix(_mix(words))).reshape(-1, 1 + LATENT_WIDTH).T)

    def _sum(self, parts: dict[str, F64]) -> F64:
        total = np.zeros(CHUNK_ROWS)
        for name, part in parts.items():
            total += (part - self._centre[name]) * self._factor[name]
        return total

    def _words(self, stream: int, number: int, use: int, count: int) -> U64:
        # As arrays: a list with a number of 2^63 or more would pass through float64.
        key = np.array([self._seed, stream], np.uint64)
        counter = np.array([0, 0, number, use], np.uint64)
        return np.random.Philox(key=key, counter=counter).random_raw(count)


def zipf_ids(uniforms: F64, size: int, exponent: float) -> I32:
    """Ids 0 to size - 1 with P(id) about proportional to (id + 1) ** -exponent.

    The inverse of the continuous power law on [1, size + 1), rounded down: cheap for any size,
    and within a few percent of the discrete law for id 0, less for the others.
    """
    if exponent == 1.0:
        values = np.power(size + 1.0, uniforms)
    else:
        power = 1.0 - exponent
        values = np.power(1.0 + uniforms * ((size + 1.0) ** power - 1.0), 1.0 / power)
    # Rounding can reach the open end.
    return np.minimum(values.astype(np.int64) - 1, size - 1).astype(np.int32)


def bayes_metrics(label: F32, probability: F64) -> dict[str, float]:
    """AUC and log loss of the true probabilities on drawn labels: no model can expect better.

    Without rows of both labels there is no AUC and no normalized entropy, and they are left out.
    """
    positive, negative = probability[label == 1.0], np.sort(probability[label == 0.0])
    log_loss = -float(np.log(positive).sum() + np.log1p(-negative).sum()) / len(label)
    if not len(positive) or not len(negative):
        return {"log_loss": log_loss}
    # Pairs in the right order, ties counting half.
    below = [
        np.searchsorted(negative, positive, "left"),
        np.searchsorted(negative, positive, "right"),
    ]
    rate = len(positive) / len(label)
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return {
        "auc": float(np.mean(below) / len(negative)),
        "log_loss": log_loss,
        "normalized_entropy": float(log_loss / entropy),
    }


def _calibrate(logit: F64, bayes_auc: float, positive_rate: float) -> tuple[float, float]:
    """Slope and bias that give the expected AUC and positive rate on the pilot rows."""
    # Quantiles stand for all rows: the solution moves by less than the sampling error.
    logit = np.sort(logit)[QUANTILE_STEP // 2 :: QUANTILE_STEP]
    low, high = 0.0, 64.0
    bias = 0.0
    for _ in range(40):
        slope = (low + high) / 2
        bias = _solve_bias(slope * logit, positive_rate)
        p = _sigmoid(slope * logit + bias)
        q = 1.0 - p
        # Expected number of pairs (positive above negative) over the expected number of pairs.
        auc = float(np.dot(p, np.cumsum(q) - q) / (p.sum() * q.sum() - np.dot(p, q)))
        low, high = (slope, high) if auc < bayes_auc else (low, slope)
    return (low + high) / 2, bias


def _solve_bias(logit: F64, positive_rate: float) -> float:
    low, high = -100.0 - float(logit.max()), 100.0 - float(logit.min())
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if _sigmoid(logit + middle).mean() < positive_rate else (low, middle)
        )
    return (low + high) / 2


def _sum_bags(values: F32, offsets: I64) -> F32:
    """[K', bags]: sums of values[:, offsets[i]:offsets[i + 1]]."""
    bag = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    sums = [np.bincount(bag, row, len(offsets) - 1) for row in values]
    return np.stack(sums).astype(np.float32)


def _sigmoid(logit: F64) -> F64:
    return 1.0 / (1.0 + np.exp(-np.clip(logit, -500.0, 500.0)))


def _uniforms(words: U64) -> F64:
    """Two numbers in (0, 1) from each word."""
    return (words.view("<u4") + 0.5) * 2.0**-32


def _normals(words: U64) -> F32:
    """Four standard normals from each word."""
    normals: F32 = _NORMAL[words.view("<u2")]
    return normals


def _mix(words: U64) -> U64:
    words = (words ^ (words >> np.uint64(30))) * _MIX[0]
    words = (words ^ (words >> np.uint64(27))) * _MIX[1]
    return words ^ (words >> np.uint64(31))
