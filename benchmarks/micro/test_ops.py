"""Every provider of every op: checked, then timed. A benchmark whose result is wrong fails and has no number."""

import time

import pytest
import torch

from benchmarks.micro.timing import rounds_for
from benchmarks.micro.workload import LeftOut

pytest.importorskip("pytest_benchmark")


@torch.inference_mode()
def test_op(item, leave_out, in_time, benchmark):
    if not in_time:
        leave_out(item.name, "the time for this run was over")
    workload = item.workload(torch.device("cpu"))
    try:
        call = workload.providers[item.provider]()
    except LeftOut as reason:
        leave_out(item.name, str(reason))
    workload.check(call())
    benchmark.group = workload.name
    benchmark.extra_info |= {
        "op": workload.op,
        "shape": workload.shape,
        "provider": item.provider,
        "unit": workload.unit,
        "amount": workload.amount_of(item.provider),
    }
    rounds = rounds_for(call, time.perf_counter)
    benchmark.pedantic(call, rounds=rounds, iterations=1, warmup_rounds=2)
