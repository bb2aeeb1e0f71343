"""Running statistics of a layer's input: exact, the same for the same rows, in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from bitroute.calibrate.budget import Layer
from bitroute.calibrate.statistics import Accumulator
from bitroute.errors import JobError

ROWS, COLUMNS = 1000, 48
FLOOD = """
import json, threading, time
import torch
from bitroute.calibrate.budget import Layer, measures
from bitroute.calibrate.statistics import Accumulator

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def watch():
    global peak
    while running:
        peak = max(peak, resident())
        time.sleep(0.005)

def give(columns, rows, accumulators, times):
    x = torch.randn(rows, columns)
    module = torch.nn.Linear(columns, 1, bias=False)
    for accumulator in accumulators * times:
        with module.register_forward_pre_hook(lambda _, args: accumulator.add(args[0])):
            module(x)
    return x.nbytes * len(accumulators) * times

wide = [Layer("transformer", f"layer{n}", 8192, item_bytes=4) for n in range(32)]
odd = Layer("transformer", "odd", 8100, item_bytes=4)  # 128 does not divide it: no Hessian, which would take long
found = measures([*wide, odd], 64, True, 2**28)
running, peak, idle = True, 0, resident()
thread = threading.Thread(target=watch)
thread.start()
with torch.inference_mode():
    accumulators = [Accumulator(layer, found.rows) for layer in found.layers]
    given = give(8192, 128, accumulators[:-1], 1) + give(8100, 2560, accumulators[-1:], 33)
running = False
thread.join()
said = {"idle": idle, "peak": peak, "bytes": given, "planned": found.memory_bytes, "block": found.block}
print(json.dumps(said))
"""


def rows(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Channels of different sizes that go together; every tenth row is zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    x[::10] = 0
    return x.to(dtype)


def measured(block: int, *calls: Tensor, name: str = "proj") -> Accumulator:
    found = Accumulator(Layer("transformer", name, COLUMNS, block=block), 16)
    for x in calls:
        found.add(x)
    return found


def tensors(accumulator: Accumulator) -> dict[str, Tensor]:
    """By kind, in the shapes of a statistics file."""
    parts: dict[str, list[Tensor]] = {}
    for kind, part in accumulator.parts():
        parts.setdefault(kind, []).append(part.reshape(-1))
    specs = accumulator.specs()
    assert parts.keys() == specs.keys()
    return {kind: torch.cat(found).reshape(specs[kind].shape) for kind, found in parts.items()}


@pytest.mark.parametrize("block", [COLUMNS, 24])  # in strips of 16 rows
def test_the_statistics_are_those_of_all_rows_in_float64(block: int) -> None:
    x = rows()
    found, exact = tensors(measured(block, x[:700].reshape(2, 350, COLUMNS), x[700:])), x.double()
    products = exact.T @ exact / ROWS
    blocks = [products[start : start + block, start : start + block] for start in range(0, COLUMNS, block)]
    assert torch.equal(found["absmax"], exact.abs().amax(0).float())
    torch.testing.assert_close(found["second_moment"].double(), products.diagonal(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["hessian"].double(), torch.stack(blocks), rtol=1e-6, atol=1e-4)  # of about 30
    assert torch.equal(found["hessian"], found["hessian"].mT)
    assert found["rows"].tolist() == [ROWS, 100]
    assert {kind: part.dtype for kind, part in found.items() if kind not in ("inputs", "rows")} == {
        "absmax": torch.float32, "second_moment": torch.float32, "hessian": torch.float32,
    }  # fmt: skip


def test_many_large_rows_do_not_drown_the_small_ones_that_follow() -> None:
    large, small = torch.full((1, COLUMNS), 4096.0), torch.full((1, COLUMNS), 0.5)
    found = measured(COLUMNS, large, *[small] * 200)
    expected = (4096.0**2 + 200 * 0.25) / 201
    got = tensors(found)
    assert got["second_moment"][0].item() == got["hessian"][0, 0, 1].item() == pytest.approx(expected, rel=1e-7)


def test_the_sample_is_rows_that_were_there_in_their_own_dtype_and_any_row_can_be_in_it() -> None:
    x = rows()
    x[:, 0] = torch.arange(ROWS) // 4
    kept = [measured(0, x[:300], x[300:], name=f"proj{n}").sample.rows for n in range(60)]
    assert {(part.dtype, part.shape) for part in kept} == {(torch.bfloat16, (16, COLUMNS))}
    known = {tuple(row.tolist()) for row in x}
    assert all(tuple(row.tolist()) in known for part in kept for row in part)
    places = torch.cat([part[:, 0] for part in kept]).float()
    assert (places.mean() - x[:, 0].float().mean()).abs() < 10  # three standard errors
    assert places.min() < 10 and places.max() > 240


def test_a_layer_that_saw_fewer_rows_keeps_them_all() -> None:
    x = rows()[1:6]
    kept = measured(0, x).sample.rows
    assert kept.shape == x.shape and sorted(kept.tolist()) == sorted(x.tolist())


def test_rows_of_two_dtypes_are_kept_in_one_that_holds_both() -> None:
    assert measured(0, rows(0), rows(1, torch.float32)).sample.rows.dtype == torch.float32


def test_a_state_that_was_taken_and_restored_goes_on_to_the_same_bits() -> None:
    first, second = measured(8, rows(0)), measured(8)
    second.restore({name: part.clone() for name, part in first.state().items()})
    for accumulator in (first, second):
        accumulator.add(rows(1))
    expected, found = tensors(first), tensors(second)
    assert all(torch.equal(found[kind], part) for kind, part in expected.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_no_statistic_can_hold_is_refused_with_the_layers_name(value: float) -> None:
    x = rows()
    x[500, 3] = value
    with pytest.raises(JobError, match="transformer/proj: the input of a layer holds NaN"):
        measured(8, x)


def test_memory_stays_under_the_budget_however_much_flows_through() -> None:
    done = subprocess.run([sys.executable, "-c", FLOOD], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bytes"] > 10 * 2**28 and found["block"] == 128
    assert 2**27 < found["planned"] <= 2**28
    assert found["planned"] * 0.9 < found["peak"] - found["idle"] < 2**28 + 128 * 2**20  # 79 of them are the inputs
