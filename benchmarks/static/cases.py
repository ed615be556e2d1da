"""Every case, and the groups they are compiled in."""

from benchmarks.static.case import Case
from benchmarks.static.cases_attention import attention_cases
from benchmarks.static.cases_rows import (
    activation_cases,
    add_norm_cases,
    kv_cache_cases,
    low_rank_cases,
    rotary_cases,
    row_cases,
)
from benchmarks.static.cases_scores import scoring_cases
from benchmarks.static.cases_selection import norm_selection_cases, selection_cases

CASES: tuple[Case, ...] = (
    *row_cases(),
    *add_norm_cases(),
    *low_rank_cases(),
    *activation_cases(),
    *rotary_cases(),
    *kv_cache_cases(),
    *scoring_cases(),
    *selection_cases(),
    *norm_selection_cases(),
    *attention_cases(),
)
GROUPS = tuple(dict.fromkeys(case.group for case in CASES))
