"""Which teacher layer each student layer copies or is held against. Layers count from 0."""

import itertools
from collections.abc import Sequence


def uniform_map(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Return the teacher layer of each student layer, evenly spread, the last on the last.

    Student layer k gets the teacher layer that ends at the same share of the depth: 12 to 6 gives
    1, 3, 5, 7, 9, 11 (Skip-BERT of arXiv 2206.01859), 6 to 5 gives 0, 1, 3, 4, 5.

    Raises:
        ValueError: the student has no layers, or more than the teacher.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(f"{student_layers} layers cannot be spread over {teacher_layers}")
    return tuple(
        # (k + 1) T / S, rounded half up, in whole numbers.
        (2 * (k + 1) * teacher_layers + student_layers) // (2 * student_layers) - 1
        for k in range(student_layers)
    )


def check_map(layers: Sequence[int], student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Return an explicit map.

    Raises:
        ValueError: it does not name one teacher layer for each student layer, in rising order.
    """
    if len(layers) != student_layers:
        raise ValueError(f"it names {len(layers)} layers, and the student has {student_layers}")
    for layer in layers:
        if not 0 <= layer < teacher_layers:
            raise ValueError(
                f"layer {layer}: there are {teacher_layers}, 0 to {teacher_layers - 1}"
            )
    if any(b <= a for a, b in itertools.pairwise(layers)):
        raise ValueError(f"{', '.join(map(str, layers))}: they must rise")
    return tuple(layers)
