"""Quantization-aware training: which weights, how many bits, which scales."""

from typing import Literal

from pydantic import NonNegativeInt, model_validator

from dqrm.settings import Settings

Bits = Literal[2, 4, 8, 16, 32]
TableGranularity = Literal["table", "row"]


class QuantConfig(Settings):
    """Fake quantization of embedding rows and MLP weights (arXiv 2410.20046, section 4)."""

    bits: Bits = 4
    """Bits of every embedding table; 32 trains in full precision."""

    table_bits: dict[str, Bits] = {}
    """Bits of single tables by column name, for example {C3: 8}; others use bits."""

    granularity: TableGranularity = "table"
    """One scale a table, as in the paper, or one scale a row."""

    scale_period: NonNegativeInt = 0
    """0: the table's scale is exact at every step, kept by maintained maxima.
    T > 0: it is refreshed from a full scan every T training steps, as in the paper."""

    ste: Literal["pass", "clip"] = "pass"
    """Gradient of weights outside the grid: passed through, or zeroed by a clip mask."""

    mlp_bits: Literal[4, 8, 32] = 4
    """Bits of the MLP weights, one scale per output channel; biases stay FP32."""

    activation_bits: Literal[8, 32] = 32
    """8 quantizes the inputs of quantized MLP layers as well, row by row: the packed model then
    multiplies integers and still gives what training saw, bit for bit."""

    skip_first_layer: bool = False
    """Leave the first layer of the bottom MLP in FP32."""

    skip_last_layer: bool = False
    """Leave the last layer of the top MLP in FP32."""

    storage: Literal["fp32", "bf16", "int8", "int4"] = "fp32"
    """What embedding rows are kept in while they are trained, rounded stochastically. int8 and
    int4: codes with a step a row and nothing beside, so these codes are what is packed."""

    @model_validator(mode="after")
    def _codes_are_what_is_trained(self) -> "QuantConfig":
        if self.storage not in ("int8", "int4"):
            return self
        bits = int(self.storage[3:])
        others = {self.bits, *self.table_bits.values()} - {bits}
        if others or self.granularity != "row" or self.ste != "pass":
            raise ValueError(
                f"storage={self.storage} trains the packed rows themselves, which have {bits} bits "
                f"and a step a row: set bits={bits}, no other table_bits, granularity=row and "
                "ste=pass"
            )
        return self

    @model_validator(mode="after")
    def _integers_meet_integers(self) -> "QuantConfig":
        if self.activation_bits == 8 and self.mlp_bits == 32:
            raise ValueError(
                "activation_bits=8 applies to layers with quantized weights; set mlp_bits=4 or 8"
            )
        return self

    @model_validator(mode="after")
    def _row_scales_have_no_period(self) -> "QuantConfig":
        if self.granularity == "row" and self.scale_period:
            raise ValueError(
                "scale_period applies to granularity=table only: a row's scale is exact at every "
                "look-up; set scale_period=0"
            )
        return self
