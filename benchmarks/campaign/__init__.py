"""The GPU campaign: everything that is measured in the first minutes on a GPU, each result kept the moment it is there.

`plan.py` lists the steps, `parent.py` runs them in child processes, `child.py` is such a process, and `steps/` holds
what each of them measures. The campaign's own CUDA calls are in `cuda.py`; `dry.py` stands in for it on a CPU. See
`docs/gpu.md`.
"""
