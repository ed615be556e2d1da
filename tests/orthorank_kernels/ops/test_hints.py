"""What callers from other libraries get wrong first, and what the error says to do."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import orthorank_kernels as ok

H, W, SCORES = torch.randn(1, 12, 16), torch.ones(16), torch.rand(1, 12)
Q, K = torch.randn(1, 8, 4, 16), torch.randn(1, 2, 12, 16)  # heads, then tokens
POSITIONS, PACKED = torch.arange(4)[None].int(), torch.arange(4).int()
TABLE, LENGTHS, CU = torch.zeros(1, 3).int(), torch.tensor([12]).int(), torch.tensor([0, 4]).int()


def paged(cache: Any, **options: Any) -> Any:
    return ok.sparse_query_attention_paged(Q[0].transpose(0, 1), *cache, PACKED, CU, TABLE, LENGTHS, **options)


def varlen(**options: Any) -> Any:
    q, kv = Q[0].transpose(0, 1), K[0].transpose(0, 1)
    return ok.sparse_query_attention_varlen(q, kv, kv, PACKED, CU, 3 * CU, **options)


def turned(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous()


BOTH, SIDE_BY_SIDE = torch.randn(2, 3, 16, 2, 16), torch.randn(3, 2, 16, 32)
CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "a share for k": (lambda: ok.select_tokens(SCORES, 0.33), "a share of n tokens is keep_count(n, 0.33)"),
    "a share for k, fused": (lambda: ok.rms_norm_select(H, W, 1e-5, 0.33), "is keep_count(n, 0.33)"),
    "packed states": (lambda: ok.rms_norm_score(H[0], W, 1e-5), "packed sequences come with cu_seqlens"),
    "packed scores": (lambda: ok.select_tokens(SCORES[0], 3), "packed sequences come with cu_seqlens"),
    "heads behind tokens": (
        lambda: ok.sparse_query_attention(turned(Q), turned(K), turned(K), POSITIONS),
        "pass x.transpose(1, 2) of q, k and v",
    ),
    "queries alone": (lambda: ok.sparse_query_attention(turned(Q), K, K, POSITIONS), "pass x.transpose(1, 2) of q"),
    "one cache for both": (lambda: paged((BOTH, BOTH)), "pass cache.unbind(0)"),
    "side by side": (lambda: paged((turned(SIDE_BY_SIDE),) * 2), "pass cache.transpose(1, 2).chunk(2, -1)"),
    "a cache of bytes": (
        lambda: paged((turned(K).byte(),) * 2),
        "k_cache has dtype uint8; it may be float32, float16, bfloat16, float64, float8_e4m3fn, float8_e5m2: if its "
        "bytes are float8, pass k_cache.view(torch.float8_e4m3fn)",
    ),
    "a bound below the longest": (
        lambda: varlen(max_seqlen_k=11),
        "max_seqlen_k is 11, and a sequence has 12 keys; pass as many or more, or None",
    ),
    "a bound below the longest, in pages": (
        lambda: paged(BOTH.unbind(0), max_seqlen_k=11),
        "max_seqlen_k is 11, and a sequence has 12 keys; pass as many or more, or None",
    ),
    "half scores": (lambda: ok.select_tokens(SCORES.half(), 3), "it may be float32: pass scores.float()"),
    "double states": (lambda: ok.rms_norm_score(H.double(), W, 1e-5), "float16, bfloat16: convert it with .to(dtype)"),
    "NumPy's k": (
        lambda: ok.select_tokens(SCORES, SCORES.numpy().argmax()),
        "k is an int64; it must be an int or an int32 or int64 tensor [batch]: pass int(k)",
    ),
    "k of a list": (
        lambda: ok.select_tokens(SCORES[0], [1], cu_seqlens=CU),
        "k is a list; it must be an int or an int32 or int64 tensor [seqs]",
    ),
    "k above the tokens": (lambda: ok.select_tokens(SCORES, 30), "the number of tokens, 12: pass min(k, 12)"),
    "a number of lengths": (
        lambda: ok.select_tokens(SCORES, 3, lengths=5),
        "lengths is an int; it must be an int32 tensor [batch]: pass torch.tensor(lengths, dtype=torch.int32, device=",
    ),
    "no positions": (
        lambda: ok.gather_rows(H, None),
        "positions is None; it must be an int32 tensor [batch, selected]",
    ),
    "offsets for rows": (
        lambda: ok.select_tokens(SCORES[0], 3, cu_seqlens=CU, position_offsets=CU),
        "position_offsets has shape [2]; it must be [1], one entry for each sequence",
    ),
    "rows of a stack": (
        lambda: ok.gather_rows(H[None], POSITIONS),
        "x has shape [1, 1, 12, 16]; it must be [batch, tokens, hidden], 3 dimensions, or packed [total, hidden]",
    ),
    "one token's gate": (
        lambda: ok.silu_and_mul(W),
        "gate has shape [16]; it must be [batch, selected, width], 3 dimensions, or packed [selected, width]",
    ),
    "one head": (
        lambda: ok.apply_rotary_at(H[0], H, H),
        "it must be [batch, heads, selected, head_dim], 4 dimensions, or packed [selected, heads, head_dim]",
    ),
    "boundaries in rows": (
        lambda: ok.select_tokens(SCORES[0], 3, cu_seqlens=CU[None]),
        "cu_seqlens has shape [1, 2]; it must be [seqs + 1], 1 dimension",
    ),
    "packed states with a map": (
        lambda: ok.add_low_rank(H[0], H[0], H[0]),
        "packed sequences come with cu_seqlens",
    ),
}


@pytest.mark.parametrize(("call", "words"), CALLS.values(), ids=CALLS)
def test_the_error_says_what_to_do(call: Callable[[], Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        call()


def test_what_is_said_works() -> None:
    assert ok.select_tokens(SCORES, ok.keep_count(12, 0.33)).positions.shape == (1, 3)
    assert ok.rms_norm_score(H[0], W, 1e-5, cu_seqlens=torch.tensor([0, 12]).int()).scores.shape == (12,)
    assert ok.sparse_query_attention(Q, K, K, POSITIONS).shape == Q.shape
    assert paged(BOTH.unbind(0), max_seqlen_k=12).shape == varlen(max_seqlen_k=12).shape == (4, 8, 16)
    assert paged(SIDE_BY_SIDE.transpose(1, 2).chunk(2, -1)).shape == (4, 8, 16)
