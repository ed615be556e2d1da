"""Every instruction that the kernels use has a test of its own and a kernel that compares it with a GPU."""

import json
import subprocess
import sys

import pytest

from tests.ptx import emitted
from tests.ptx.probes import forms_in
from tests.ptx.probes_warps import all_probes
from tests.ptx.test_kernels import ROOT

UNIT_TESTS = (
    "async", "copies", "float", "integer", "memory", "races", "schedule", "tcgen05", "undefined", "warp", "wgmma",
)  # fmt: skip
# What no kernel of `probes` has, and why.
NOT_PROBED = {
    "cp.async.bulk.tensor.4d.shared::cta.global.mbarrier::complete_tx::bytes": "needs a tensor map, which the driver "
    "encodes: what the harness passes are pointers",
    "cvta.param.u64": "the address of a tensor map among the parameters: see above",
    "ld.param.b32": "the harness passes pointers, which are 64 bits wide",
    "ld.param.s32": "the harness passes pointers, which are 64 bits wide",
    "setmaxnreg.dec.sync.aligned.u32": "changes how many registers a thread has, and no result",
    "setmaxnreg.inc.sync.aligned.u32": "the same",
}
PROBE_TARGETS = {80: "sm_80", 90: "sm_90", 100: "sm_100"}


def test_every_form_is_compared_with_a_gpu():
    probed = {target: set() for target in emitted.TARGETS}
    for probe in all_probes():
        for target in probe.targets:
            probed[PROBE_TARGETS[target]] |= forms_in(probe)
    missing = {
        f"{form} on {t}" for form, on in emitted.read().items() for t in on if form not in probed[t] | set(NOT_PROBED)
    }
    assert missing == set()
    assert set(NOT_PROBED) <= set(emitted.read()), "take it off the list: no kernel has it any more"
    assert not set(NOT_PROBED) & set.union(*probed.values()), "take it off the list: it is probed"


@pytest.mark.slow  # it runs the tests of the table once more
def test_every_form_has_a_test_of_its_own():
    """The tests of the table run again in one process, which notes the forms that they run."""
    files = [f"packages/ptx-check/tests/test_{name}.py" for name in UNIT_TESTS]
    code = (
        "import sys, json, pytest, tests.ptx; from ptx_check import snippet;"
        f"code = pytest.main(['-q', '-p', 'no:xdist', '-p', 'no:cacheprovider', *{files!r}]);"
        "print(json.dumps(sorted(snippet.RUN))); sys.exit(code)"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-4000:]
    run = set(json.loads(child.stdout.splitlines()[-1]))
    assert set(emitted.read()) - run == set()
