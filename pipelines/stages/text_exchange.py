"""Settings of what processes that train a text model together send each other."""

from typing import TYPE_CHECKING, Final, Literal

from pydantic import NonNegativeInt, PositiveFloat

from dqrm.settings import Settings

if TYPE_CHECKING:
    from dqrm.training.config import ExchangeConfig

MEETING: Final = ("backend", "timeout_seconds")
"""Those of them that say how processes meet, not what is sent."""


class TextExchange(Settings):
    """What several processes send each other; without effect in a single one.

    The names and their meanings are those of training a recommender.
    """

    backend: Literal["auto", "ccl", "gloo", "ccl-intel"] = "auto"
    """ccl: oneCCL. gloo: torch's own. auto: oneCCL where every process can load it, else Gloo."""

    rows: Literal["fp32", "bf16", "int8", "int4"] = "int8"
    """Gradients of the word embeddings, those of the words that a batch has; int8 and int4 have a
    scale a row."""

    dense: Literal["fp32", "bf16", "fp16", "int8", "int4", "sign"] = "int8"
    """All other gradients; int8 and int4 have a scale a block, sign is one bit a value."""

    error_feedback: bool = True
    """Add what the dense codec lost to the next step's gradients."""

    residual_rows: NonNegativeInt | None = None
    """Rows whose loss is kept for when they come again; None keeps up to 262,144 with rows=int4
    and none otherwise, where stochastic rounding is right on average."""

    warmup_steps: NonNegativeInt = 0
    """Steps at the beginning that exchange in FP32."""

    timeout_seconds: PositiveFloat = 600.0
    """How long to wait for another process before the run fails and names it."""

    def config(self) -> "ExchangeConfig":
        """As the exchange takes them."""
        from dqrm.training.config import ExchangeConfig

        return ExchangeConfig.model_validate(self.model_dump())
