"""Training on weight grids: linear layers by parametrization, embeddings by looked-up rows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dqrm.compress.grids.granularity import Granularity
from dqrm.compress.grids.record import Grid, WeightRecord, dequantize, fit_record
from dqrm.compress.grids.rounding import Rounding
from dqrm.compress.grids.straight_through import straight_through
from dqrm.compress.schedules import BitsState, MoqBits, period_factor
from dqrm.compress.transforms.base import Transform, matching_modules
from dqrm.compress.transforms.latent import WeightStep, add_step, latent_weight, settle
from dqrm.compress.transforms.patterns import NMStep, pattern_step
from dqrm.compress.transforms.rows import quantize_rows_of, rows_apart, settle_rows


class QuantizeWeights(Transform):
    """Fake-quantizes weights; gradients pass straight through.

    Of an embedding only the rows that are looked up are quantized, each with its own scale.

    Args:
        match: patterns of the names of linear layers and embeddings.
        bits: of a code, in the end. 1 is binary and 2 ternary unless ``grid`` says otherwise.
        granularity: of the scales. Rows of an embedding never share them: it has one a row where
            those of a layer are for more.
        grid: None takes it from the bits.
        rounding: where gradients are taken; what is evaluated and frozen is rounded to nearest.
        full_range: of a symmetric or asymmetric grid (see :func:`dqrm.compress.grids.record.fit`).
        schedule: leads to ``bits``; None has them from the first step on.
        sensitivity: whether :meth:`set_sensitivity` will tell how careful to be with each weight.
        mixed_end: whether a sensitive weight may end with more bits than the target; otherwise
            sensitivities that lead to it are refused.
    """

    order = 2

    def __init__(
        self,
        match: Sequence[str],
        bits: int,
        granularity: Granularity = Granularity("row"),  # noqa: B008
        grid: Grid | None = None,
        *,
        rounding: Rounding = "nearest",
        full_range: bool = False,
        schedule: MoqBits | None = None,
        sensitivity: bool = False,
        mixed_end: bool = False,
    ) -> None:
        if schedule is not None and schedule.target != bits:
            raise ValueError(f"the schedule leads to {schedule.target} bits, not to {bits}")
        if sensitivity and schedule is None:
            raise ValueError("sensitivity changes the periods of a schedule, and there is none")
        self.match = tuple(match)
        self.schedule = schedule or MoqBits(bits, bits, 1)
        self.granularity = granularity
        self.grid = grid
        self.rounding = rounding
        self.full_range = full_range
        self.sensitivity = sensitivity
        self.mixed_end = mixed_end
        self._steps: dict[str, FakeQuantizeWeight] = {}
        self._modules: dict[str, nn.Module] = {}
        self._states: dict[str, BitsState] = {}
        self._factors: dict[str, int] = {}
        self._total = 0

    def attach(self, model: nn.Module, steps: int) -> None:
        """Put the grid behind what else is done to the weights."""
        self.schedule.check(steps)
        self._total = steps
        self._modules = matching_modules(model, self.match, (nn.Linear, nn.Embedding))
        for name, module in self._modules.items():
            embedding = isinstance(module, nn.Embedding)
            granularity = rows_apart(self.granularity) if embedding else self.granularity
            step = FakeQuantizeWeight(
                granularity,
                self.schedule.start,
                self.grid,
                self.rounding,
                full_range=self.full_range,
            )
            self._steps[name] = step
            self._states[name] = self.schedule.begin()
            if isinstance(module, nn.Embedding):
                quantize_rows_of(name, module, step)
            else:
                step.follow(pattern_step(module))
                add_step(model, name, step)
        self._show(0)

    def before_forward(self, step: int) -> None:
        """Take bits down where that is due."""
        if self.sensitivity and not self._factors and step >= self.schedule.offset:
            raise RuntimeError("the schedule's sensitivity was never told: call set_sensitivity")
        # No change that could not settle by the last step.
        latest = min(step, self._last_change)
        for name, state in self._states.items():
            state.advance(self.schedule, latest, self._factors.get(name, 1))
        self._show(step)

    def set_sensitivity(self, values: Mapping[str, float | None]) -> None:
        """Tell how sensitive weights are; it counts from the next change of bits on.

        Args:
            values: from 0 to 1 by module: the largest curvature of its block as a share of the
                largest of all; 0 where it could not be found, None where it was not looked for.

        Raises:
            ValueError: a module is missing, or bits would not reach the target in time.
        """
        missing = sorted(set(self._modules) - set(values))
        if missing:
            raise ValueError(f"no sensitivity of {', '.join(missing)}")
        factors = {name: period_factor(values[name]) for name in self._modules}
        for name, factor in factors.items():
            if not self.mixed_end:
                self._check_end(name, factor)
        self._factors = factors

    def _check_end(self, name: str, factor: int) -> None:
        ahead = replace(self._states[name])
        while ahead.bits > self.schedule.target:
            ahead.advance(self.schedule, self.schedule.offset + ahead.period, factor)
        if ahead.changed > self._last_change:
            settled = ahead.changed + self.schedule.steps_to_settle
            raise ValueError(
                f"{name}: with factor {factor} its bits settle at {self.schedule.target} in step "
                f"{settled:,}, but training has {self._total:,} steps; lower period or start, or "
                "allow a mixed_end"
            )

    @property
    def _last_change(self) -> int:
        """The last step in which bits may go down and still settle."""
        return self._total - 1 - self.schedule.steps_to_settle

    def _show(self, step: int) -> None:
        for name, state in self._states.items():
            self._steps[name].bits = state.bits
            self._steps[name].mix = state.mix(self.schedule, step)

    def freeze(self) -> None:
        """Put the weights on the grid for good.

        Raises:
            RuntimeError: weights are still part FP32.
        """
        if any(step.mix for step in self._steps.values()):
            raise RuntimeError("weights are still part FP32; train until bits have settled")
        for name, module in self._modules.items():
            if isinstance(module, nn.Embedding):
                settle_rows(module, self._steps[name])
            else:
                settle(module)

    def finished(self) -> bool:
        """Return whether all bits are those of the end, and nothing is FP32 any more."""
        schedule, last = self.schedule, self._last_change
        settled = all(
            state.bits == schedule.target or schedule.offset + state.period > last
            for state in self._states.values()
        )
        return settled and not any(step.mix for step in self._steps.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Return where the bits of each weight are."""
        factors = {f"{name}.factor": torch.tensor(f) for name, f in self._factors.items()}
        states = {f"{name}.bits": state.tensor() for name, state in self._states.items()}
        shown = {
            f"{name}.mix": torch.tensor(step.mix, dtype=torch.float64)
            for name, step in self._steps.items()
        }
        return {**factors, **states, **shown}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state``."""
        wanted = {f"{name}.{part}" for name in self._modules for part in ("bits", "mix")}
        factors = {f"{name}.factor" for name in self._modules}
        if not wanted <= set(state) <= wanted | factors:
            raise ValueError("the state is that of other modules")
        for name, step in self._steps.items():
            self._states[name] = BitsState.of(state[f"{name}.bits"])
            step.bits = self._states[name].bits
            step.mix = state[f"{name}.mix"].item()
        self._factors = {
            name: int(state[f"{name}.factor"])
            for name in self._modules
            if f"{name}.factor" in state
        }

    def metrics(self) -> dict[str, float]:
        """Return the mean bits of a weight, and how much of the weights is FP32 still."""
        sizes = self._sizes()
        bits = sum(sizes[name] * step.bits for name, step in self._steps.items())
        mix = sum(sizes[name] * step.mix for name, step in self._steps.items())
        total = sum(sizes.values())
        return {"bits/mean": bits / total, "bits/fp32_share": mix / total}

    def weight_count(self) -> int:
        """Return how many weights its metrics are about."""
        return sum(self._sizes().values())

    def _sizes(self) -> dict[str, int]:
        return {name: latent_weight(module).numel() for name, module in self._modules.items()}


def grid_of(bits: int, grid: Grid | None = None) -> Grid:
    """Return the grid of a number of bits: binary of 1, ternary of 2, else symmetric."""
    if grid is not None:
        return grid
    if bits > 2:
        return "symmetric"
    return "ternary" if bits == 2 else "binary"


class FakeQuantizeWeight(WeightStep):
    """The step that puts a weight on a grid."""

    def __init__(
        self,
        granularity: Granularity,
        bits: int,
        grid: Grid | None = None,
        rounding: Rounding = "nearest",
        *,
        full_range: bool = False,
    ) -> None:
        super().__init__()
        self.granularity = granularity
        self.grid = grid
        self.rounding = rounding
        self.full_range = full_range
        self.bits = bits
        self.mix = 0.0
        """Share of FP32 in the value."""
        # A list hides the step from torch: it is a part of the weight, not of this one.
        self._patterns: list[NMStep] = []

    @property
    def current_grid(self) -> Grid:
        """The grid of the present bits."""
        return grid_of(self.bits, self.grid)

    def follow(self, pattern: NMStep | None) -> None:
        """Fit scales to the weights that ``pattern``, the step before, keeps."""
        self._patterns = [] if pattern is None else [pattern]

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight on the grid, with the gradient passed straight through."""
        if self.mix == 1.0:
            return weight
        # Not self.training: a model may be trained in evaluation mode, to leave dropout out.
        rounding = self.rounding if torch.is_grad_enabled() else "nearest"
        with torch.no_grad():
            value, _ = self.quantized(weight, rounding)
            if self.mix:
                value = torch.lerp(value, weight, self.mix)
        return straight_through(weight, value)

    def quantized(
        self, weight: Tensor, rounding: Rounding = "nearest"
    ) -> tuple[Tensor, WeightRecord]:
        """Return the value of ``weight`` [R, ...] on the grid and how it is to be stored."""
        grid = self.current_grid
        kept = self._patterns[0].mask if self._patterns else None
        codes, record = fit_record(
            weight,
            grid,
            self.bits,
            self.granularity,
            kept,
            rounding,
            full_range=self.full_range,
        )
        return dequantize(codes, record), record

    def described(self, record: WeightRecord, before: Tensor) -> WeightRecord:
        """Return ``record`` with the grid and the scales of ``before``."""
        mine = self.quantized(before)[1]
        return replace(
            mine,
            mask=record.mask,
            activation_bits=record.activation_bits,
            activation_grid=record.activation_grid,
        )
