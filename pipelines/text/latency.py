"""How long transformers take for a batch, side by side."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dqrm.compress.lower.latency import median_seconds
from dqrm.pipelines.text.positions import longest_input

Bucket = tuple[int, int]
"""Sentences, and tokens a sentence."""


def check_buckets(model: Any, buckets: Sequence[Bucket]) -> None:
    """Hold the lengths of buckets against the positions that a model knows.

    Raises:
        ValueError: a bucket is longer.
    """
    longest = longest_input(model)
    for _, tokens in buckets:
        if longest is not None and tokens > longest:
            raise ValueError(f"a bucket of {tokens} tokens: the model takes up to {longest}")


def uncompressed(model: Any, compiled: bool) -> dict[str, Callable[..., object]]:
    """Return ``model`` in FP32 and in bf16, and on demand compiled, by what they are called.

    Args:
        model: dense, in FP32 and evaluation mode.
        compiled: whether to have bf16 compiled by torch as well.
    """
    half = copy.deepcopy(model).to(torch.bfloat16)
    found = {"fp32": model, "bf16": half}
    return found | ({"bf16_compiled": torch.compile(half)} if compiled else {})


def latencies(
    models: Mapping[str, Callable[..., object]],
    vocabulary: int,
    bucket: Bucket,
    threads: int,
    seconds: float,
) -> dict[str, float]:
    """Return the median seconds of a batch of random tokens, without padding, of each model.

    Args:
        models: by name, called with input_ids and attention_mask.
        vocabulary: tokens are below it.
        bucket: shape of the batch.
        threads: of torch, for the time.
        seconds: to spend, about.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, bucket, generator=generator)
    mask = torch.ones_like(tokens)

    def call(model: Callable[..., object]) -> Callable[[], object]:
        return lambda: model(input_ids=tokens, attention_mask=mask)

    with torch.inference_mode(), _threads(threads):
        return median_seconds({name: call(model) for name, model in models.items()}, seconds)


def fastest(measured: Sequence[Mapping[str, float]]) -> str:
    """Return the name with the least product of times."""
    return min(measured[0], key=lambda name: math.prod(times[name] for times in measured))


def latency_metrics(bucket: Bucket, threads: int, times: Mapping[str, float]) -> dict[str, float]:
    """Return milliseconds, and by how much ``lowered`` is faster than the others, by name."""
    begin = f"latency/{bucket[0]}x{bucket[1]}/{threads}_{'threads' if threads > 1 else 'thread'}"
    metrics = {f"{begin}/{name}_ms": 1000 * value for name, value in times.items()}
    return metrics | {
        f"{begin}/times_{name}": value / times["lowered"]
        for name, value in times.items()
        if name != "lowered"
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
