"""What 4 bits cost or gain: one recipe in FP32 and at low bits, over several seeds.

Every arm trains with the same recipe, is selected on validation and tested once a seed. A third
arm costs no training: the FP32 model quantized afterwards with one scale per row, which is what
is served today where nobody trains at low bits.
"""

from dqrm.config import RunConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.study.arms import FULL, Arm
from dqrm.study.kinds import Question


def question(config: RunConfig, dataset: PreparedDataset, processes: int) -> Question:
    """Ask of ``config`` in FP32, quantized row-wise afterwards (but at 32 bits), and as configured.

    Raises:
        ValueError: the recipe does not quantize.
    """
    quant = config.quant
    if quant.bits == 32 and quant.storage == "fp32":
        raise ValueError("quant.bits=32: give the low-bit recipe; FP32 is trained beside it")
    afterwards = {"granularity": "row", "scale_period": 0, "storage": "fp32"}
    after = Arm(
        "fp32-by-row", f"FP32, then INT{quant.bits} by row", {"quant": afterwards}, after="fp32"
    )
    return Question(
        "accuracy",
        "What low bits cost or gain.",
        (
            Arm("fp32", "FP32", FULL),
            *([after] if quant.bits != 32 else []),
            Arm("trained", _name(config)),
        ),
        ours="trained",
        rival="fp32",
        pictures=("curves",),
    )


def _name(config: RunConfig) -> str:
    """Name the arm that trains as configured."""
    quant, precision = config.quant, config.train.precision
    parts = [f"INT{quant.bits}"] if quant.bits != 32 else []
    parts += [f"{quant.storage}-rows"] if quant.storage != "fp32" else []
    parts += [f"{precision}-products"] if precision != "fp32" else []
    return "-".join(parts)
