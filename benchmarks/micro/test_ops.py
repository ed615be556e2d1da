"""Every provider of every op: checked, then timed. A benchmark whose result is wrong fails and has no number."""

import pytest
import torch

from benchmarks.micro.timing import rounds_for, timer_and_setup
from benchmarks.micro.workload import LeftOut

pytest.importorskip("pytest_benchmark")


@torch.inference_mode()
def test_op(item, device, leave_out, in_time, benchmark):
    if not in_time:
        leave_out(item.name, "the time for this run was over")
    workload = item.workload(device)
    try:
        call = workload.providers[item.provider]()
    except LeftOut as reason:
        leave_out(item.name, str(reason))
    workload.check(call())
    timer, setup = timer_and_setup(device)
    benchmark._timer = timer  # a marker would have to know the device when the tests are collected
    benchmark.group = workload.name
    benchmark.extra_info |= {
        "op": workload.op,
        "shape": workload.shape,
        "provider": item.provider,
        "unit": workload.unit,
        "amount": workload.amount,
    }
    rounds = rounds_for(call, timer)
    benchmark.pedantic(call, setup=setup, rounds=rounds, iterations=1, warmup_rounds=2)
