"""How touched rows are sent."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rows:
    """Codec of touched rows: packed row numbers, and values of ``bits`` with a scale a row.

    At D = 16 a row takes about 20 bytes with INT8 and 12 with INT4, and 72 as FP32 with int64
    numbers. The bytes are defined in dqrm.kernels.row_messages_reference.
    """

    bits: Literal[32, 16, 8, 4] = 8
    """32 is float32, 16 bfloat16; 8 and 4 are integers with a bfloat16 scale a row."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """Of rows without a residual. Stochastic rounding is right on average, so that nothing needs
    to be kept; rows with a residual are rounded to nearest, which loses less."""

    def __post_init__(self) -> None:
        if self.bits not in (32, 16, 8, 4) or self.rounding not in ("stochastic", "nearest"):
            raise ValueError(f"{self}: bits must be 32, 16, 8 or 4, rounding stochastic or nearest")

    @property
    def number(self) -> int:
        """Stands for the codec in headers."""
        return 64 + self.bits


def row_codec_named(text: str) -> Rows:
    """Return the row codec of a short name: fp32, bf16, int8 or int4.

    Raises:
        ValueError: there is no such codec.
    """
    known = {"fp32": Rows(32), "bf16": Rows(16), "int8": Rows(8), "int4": Rows(4)}
    if text not in known:
        raise ValueError(f"row codec {text!r}: must be one of {', '.join(known)}")
    return known[text]
