"""Gives what the layers of a running pipeline are called with to their accumulators, at some of its steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from itertools import pairwise
from random import Random
from typing import Any

from torch import Tensor, nn

from bitroute.calibrate.statistics import CHUNK_ELEMENTS, Accumulator
from bitroute.errors import JobError, Problem
from bitroute.eval.patches import patches
from bitroute.eval.recording import DENOISERS


class Capture:
    """Hooks on the layers of a pipeline. A denoiser's layers are heard at the chosen steps, others always.

    timesteps: at how many steps of each sample; None: at all of them.
    """

    def __init__(self, pipe: Any, accumulators: Mapping[str, Accumulator], timesteps: int | None) -> None:
        self.pipe, self.accumulators, self.timesteps = pipe, accumulators, timesteps
        self.number = self.step = 0  # of the sample, and of its steps
        self.chosen: frozenset[int] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts, whatever the pipeline does is heard."""
        with ExitStack() as stack:
            for accumulator in self.accumulators.values():
                layer = accumulator.layer
                module = getattr(self.pipe, layer.component).get_submodule(layer.name)
                heard = partial(self._hear, accumulator)
                stack.callback(module.register_forward_pre_hook(heard, with_kwargs=True).remove)
            stack.enter_context(self._counting())
            yield

    def begin(self, number: int) -> None:
        """The next sample; number: counted from 0."""
        self.number, self.step, self.chosen = number, 0, None

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """A step ends with the scheduler's. Counted in its class: some pipelines step with copies of it beside it."""
        scheduler = getattr(self.pipe, "scheduler", None)
        if scheduler is None:
            yield
            return
        kind = type(scheduler)
        take, own = kind.step, "step" in vars(kind)

        @wraps(take)  # pipelines look at the signature
        def step(this: Any, *args: Any, **options: Any) -> Any:
            self.step += this is scheduler
            return take(this, *args, **options)

        kind.step = step
        try:
            yield
        finally:
            if own:
                kind.step = take
            else:
                del kind.step

    def _hear(self, accumulator: Accumulator, module: nn.Module, args: Any, options: Mapping[str, Any]) -> None:
        layer = accumulator.layer
        if layer.component in DENOISERS and not self._is_chosen():
            return
        x: Tensor = args[0] if args else next(iter(options.values()))
        if layer.convolution:  # patches overlap: all of them would be many times the input
            x = patches(x.detach(), module, max(1, CHUNK_ELEMENTS["cpu"] // layer.columns))
        if x.numel():
            try:
                accumulator.add(x)
            except JobError as error:
                raise JobError(self._where(error.problems[0])) from error

    def _is_chosen(self) -> bool:
        if self.timesteps is None or not self.steps:
            return True
        if self.chosen is None:
            self.chosen = steps_of(self.number, self.steps, self.timesteps)
        return self.step in self.chosen

    @property
    def steps(self) -> int:
        timesteps = getattr(getattr(self.pipe, "scheduler", None), "timesteps", None)
        return 0 if timesteps is None else len(timesteps)

    def _where(self, problem: Problem) -> Problem:
        got = f"in step {self.step + 1} of {self.steps} of sample {self.number + 1}"
        return Problem(problem.what, problem.where, got, "finite numbers", "the model itself may overflow in bfloat16")


def steps_of(number: int, steps: int, wanted: int) -> frozenset[int]:
    """Of the steps 0 … steps - 1 one from each of `wanted` equal parts; the next sample takes the next one of each.

    After as many samples as a part has steps each step was taken. Where a part begins is drawn by a fixed seed, so
    that the parts do not go in step.
    """
    if wanted >= steps:
        return frozenset(range(steps))
    draw = Random(0)
    bounds = [part * steps // wanted for part in range(wanted + 1)]
    parts = [range(start, stop) for start, stop in pairwise(bounds)]
    return frozenset(part[(number + draw.randrange(len(part))) % len(part)] for part in parts)
