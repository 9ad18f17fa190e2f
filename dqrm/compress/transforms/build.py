"""From settings to transforms."""

from collections.abc import Sequence

from dqrm.compress.transforms.base import Compression, Transform
from dqrm.compress.transforms.config import TransformConfig


def build_compression(configs: Sequence[TransformConfig]) -> Compression:
    """Return the transforms of ``configs``, put in the order they have to be in."""
    made: list[Transform] = [t for config in configs for t in config.transforms()]
    return Compression(sorted(made, key=lambda transform: transform.order))
