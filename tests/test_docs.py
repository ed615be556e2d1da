"""The documentation is true: its code runs, its tables are those of the code, its links lead somewhere."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank_kernels.support import OPS

DOCS = Path(__file__).resolve().parent.parent / "docs"
KERNELS = (DOCS / "kernels.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_code_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as on a machine that serves
    names: dict[str, Any] = {}
    code = blocks(KERNELS, "python")
    assert len(code) >= 6
    for number, block in enumerate(code):
        exec(compile(block, f"docs/kernels.md, block {number}", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    promised = [line[2:] for block in code for line in block.splitlines() if line.startswith("# (")]
    assert printed == promised


def test_the_layer_is_the_dense_one_where_every_token_is_selected() -> None:
    """The first block with k = all tokens, against attention and MLP written out."""
    block = blocks(KERNELS, "python")[0]
    everything = block.replace("[4, 0, 10]", "[11, 0, 30]").replace("capacity = 16", "capacity = 41")
    everything = everything[: everything.index("assert counts")]
    n: dict[str, Any] = {}
    before = "h = torch.randn(total, hidden, generator=new)\n"
    exec(everything.replace(before, before + "given = h.clone()\n"), n)
    assert n["rows"].tolist() == list(range(41))

    def norm(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (n["hidden"],), eps=1e-5)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        cos, sin = n["cos"][:, None], n["sin"][:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    h = n["given"]
    x = norm(h)
    q, k, v = (rotated((x @ n["w_q"].T).view(41, 4, 16)), rotated((x @ n["w_k"].T).view(41, 2, 16)), x @ n["w_v"].T)
    v = v.view(41, 2, 16)
    attended = torch.cat(
        [
            torch.nn.functional.scaled_dot_product_attention(
                *(y[part].transpose(0, 1) for y in (q, k, v)), is_causal=True, enable_gqa=True
            ).transpose(0, 1)
            for part in (slice(0, 11), slice(11, 41))
        ]
    )
    h = h + attended.flatten(1) @ n["w_o"].T
    gate, up = (norm(h) @ n["w_gate_up"].T).chunk(2, -1)
    h = h + (torch.nn.functional.silu(gate) * up) @ n["w_down"].T
    torch.testing.assert_close(n["h"], h, rtol=1e-4, atol=1e-4)


def test_the_matrix_is_what_is_supported() -> None:
    table = KERNELS[KERNELS.index("## What is supported") :]
    rows = re.findall(
        r"^\| (`.*?) \| (.*?) \| (.*?) \| (.*?) ?\|$", table[: table.index("## Compilation")], flags=re.MULTILINE
    )
    found = {}
    for ops, gpu, cpu, besides in rows:
        for op in re.findall(r"`(\w+)`", ops):
            found[op] = (gpu, cpu)
            limit = OPS[op].largest_head_dim
            assert limit is None or "sparse_query_attention_paged" in op or f"to {limit}" in besides
    assert found == {op: (names(it.kernel), names(it.pytorch)) for op, it in OPS.items()}


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def test_every_op_has_its_line() -> None:
    table = KERNELS[KERNELS.index("## The ops") : KERNELS.index("## Memory")]
    assert set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == set(OPS)


def test_links_and_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", KERNELS):
        assert "://" in target or (DOCS / target).exists(), target
    for path in re.findall(r"`((?:examples|orthorank_kernels)/[\w/.]+\.py)`", KERNELS):
        assert (DOCS.parent / path).exists(), path


def test_the_commands_and_variables_are_the_real_ones() -> None:
    from orthorank_kernels import cli

    sources = "".join(p.read_text() for p in (DOCS.parent / "orthorank_kernels").rglob("*.py"))
    help_text = cli._parser().format_help() + cli._parser()._subparsers._group_actions[0].choices["tune"].format_help()
    for variable in re.findall(r"^\| `(ORTHORANK_\w+|TRITON_INTERPRET)", KERNELS, flags=re.MULTILINE):
        assert f'"{variable}"' in sources, variable
    for option in re.findall(r"--[a-z]+", blocks(KERNELS, "")[0]):
        assert option in help_text


def test_no_page_holds_both_sides_of_a_merge() -> None:
    root = DOCS.parent
    pages = [*root.glob("*.md"), *DOCS.rglob("*.md"), *(root / "packages").rglob("*.md")]
    assert len(pages) > 20
    found = [
        f"{page.relative_to(root)}: {line}"
        for page in pages
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.match(r"(<{7}|>{7}) |={7}$", line)
    ]
    assert not found
