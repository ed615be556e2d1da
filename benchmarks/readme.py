"""Writes the tables of the README and of pages from the committed results, so that no figure is typed by hand.

python benchmarks/readme.py           # rewrite the marked sections
python benchmarks/readme.py --check   # exit 1 when they are out of date
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import readme_reproduce

from benchmarks import readme_docs, readme_front, readme_gpu
from benchmarks.readme_docs import RESULTS, load, table
from orthorank.common import format as form
from orthorank.report import words

ROOT = Path(__file__).resolve().parent.parent


def demo_section() -> str:
    """The demo's table, how its rows differ, and what it was measured on."""
    results = load("demo/results.json")
    rows = [
        [
            words.TITLES[row["name"]],
            str(len(row["layers"])) if row["layers"] else "",
            form.percent(row["nominal_sparsity"]),
            f"{row['perplexity']:.2f}",
            words.quality_cells(row)[-1] if row["layers"] else "",
            *words.speed_cells(row)[1:],
        ]
        for row in results["rows"]
    ]
    head = ["", "layers", "sparsity", "perplexity", "nats above dense", "prefill tokens/s", "speed-up", "FLOP bound"]
    model, settings = results["model_info"], results["settings"]
    unmeasured = "" if results.get("speed") else " Speed was not measured: the machine had other work."
    note = (
        f"{'. '.join(words.differences(results))} nats a token, with standard errors over "
        f"{results['quality']['windows']} windows.{unmeasured} `{results['model']}` on a CPU ({model['dtype']}, "
        f"{results['environment']['threads']} threads, prompts of {settings['prompt_tokens']:,} tokens); text: "
        f"{results['text']}. From `orthorank demo`, in `benchmarks/results/demo/results.json`."
    )
    return f"{table(head, rows)}\n\n{note}"


def results_section() -> str:
    """One line for each benchmark: what, how much, by which command."""
    rows = [
        line
        for make in (
            static_rows,
            byte_rows,
            prefill_rows,
            search_rows,
            criteria_rows,
            mode_rows,
            import_rows,
        )
        for line in make()
    ]
    return table(["what", "measured", "command"], rows)


def static_rows() -> list[list[str]]:
    """What the kernels compile to: attention and selection by name, everything else as counts."""
    report = load("static.json")
    command = "`python benchmarks/static_report.py`, all of it in [static.md](benchmarks/results/static.md)"
    found = {(row["target"], row["case"]): row for row in report["rows"]}
    lines = []
    for target in ("sm_80", "sm_90"):
        for head_dim in (64, 128):
            name = f"dim {head_dim}, groups of 4"
            row, peer = found[target, name], found.get((target, f"FlexAttention {name}"), {})
            figure = f"{row['registers']} registers, {row['spills']} spills, {row['ntm']:.0f} ({row['ntm_masked']:.0f})"
            if "ntm" in peer:
                beside = f"{peer['registers']}, {peer['spills']}, {peer['ntm']:.0f} ({peer['ntm_masked']:.0f})"
                figure += f"; FlexAttention: {beside}"
            what = (
                f"attention compiled for {target}, bf16, head_dim {head_dim}, 4 heads for each key/value head: "
                "instructions besides matrix instructions for each MFLOP of those (in masked blocks)"
            )
            lines.append([what, figure, command])
    row = found["sm_90", "select_tokens 2048 tokens"]
    peer = [r for (at, name), r in found.items() if at == "sm_90" and name.startswith("FlagGems") and "error" not in r]
    figure = f"{row['instructions']:,} instructions, one launch"
    if peer:
        total = sum(r["instructions"] for r in peer)
        figure += f"; FlagGems' top-k: {total:,} in {len(peer)} launches, not in position order"
    lines.append(["selection of k among 2,048 compiled for sm_90", figure, command])
    ours = [row for row in report["rows"] if row["group"] != "peers" and row["target"] != "gfx1100"]
    spilling = sum(bool(row.get("hot_spills")) for row in ours)
    clean = sum(row.get("spills") == 0 for row in ours)
    lines.append(
        [
            f"every launch setting of every kernel on {len({row['target'] for row in ours})} targets",
            f"{len(ours):,} compiled, {clean:,} of them without any spill, {spilling} with spills in attention's loop",
            command,
        ]
    )
    return lines


def byte_rows() -> list[list[str]]:
    """Bytes over the fewest that could be moved, and query-key pairs over those that are needed."""
    report, command = load("bytes.json"), "`python benchmarks/byte_report.py`"
    ops = {f"{row['op']} {row['shape']}": row for row in report["ops"]}
    many = "rows as in a large batch"
    norm = ops[f"rms_norm_score 256 x 4096, {many}"]["requested"]
    peer = next((r["requested"] for r in report["peers"] if r["op"].startswith("Liger")), None)
    beside = f"; Liger-Kernel's norm, without a score: {peer:.2f}" if peer is not None else ""
    lines = [
        ["bytes that norm + score asks for, over the fewest possible", f"{norm:.2f}{beside}", command],
        [
            "the same of gather, scatter and rotary",
            f"{ops['gather_rows 170 of 512 x 4096']['requested']:.2f}, "
            f"{ops['scatter_rows_ 170 of 512 x 4096']['requested']:.2f}, "
            f"{ops['apply_rotary_at 170 x 32 x 128']['requested']:.2f}",
            command,
        ],
        [
            "the same of selection, 2,048 and 32,768 scores",
            f"{ops['select_tokens 682 of 2,048']['requested']:.2f}, "
            f"{ops['select_tokens 10,922 of 32,768']['requested']:.2f} (from the L2 cache); "
            f"`torch.topk` and `sort`: at least {report['peers'][-1]['requested_at_least']:.2f}",
            command,
        ],
    ]
    pairs = [r for r in report["attention_pairs"] if (r["target"], r["head_dim"], r["group"]) == ("sm_90", 128, 4)]
    others = {(r["op"].split()[0], r["tokens"]): r["executed_over_needed"] for r in report["attention_peers"]}
    for row in pairs:
        flex, masked = (others[name, row["tokens"]] for name in ("FlexAttention,", "scaled_dot_product_attention"))
        figure = f"{row['executed_over_needed']:.2f}; FlexAttention {flex:.2f}, SDPA with a mask {masked:.2f}"
        lines.append(
            [f"query-key pairs computed over needed, a third of {row['tokens']:,} tokens, sm_90, head_dim 128",
             figure, command]
        )  # fmt: skip
    return lines


def prefill_rows() -> list[list[str]]:
    options = "--dtype float32 bfloat16 --threads 1 2 --json benchmarks/results/prefill_smollm2.json"
    command = f"`python benchmarks/bench_prefill.py {options}`"
    lines, found = [], load("prefill_smollm2.json")
    cpu = ", ".join(found["cpu"])
    for r in found["rows"]:
        speed = r["speed"]
        what = (
            f"prefill of {speed['prompt']:,} tokens, SmolLM2-135M, {len(r['layers'])} layers at ratio 1/3, "
            f"{speed['dtype']}, {speed['threads']} CPU thread(s) with {cpu}"
        )
        figure = (
            f"{r['measured_speedup']:.3f}x of an ideal {r['flop_speedup']:.3f}x by FLOPs: "
            f"{r['measured_over_ideal']:.2f} of what is possible"
        )
        lines.append([what, figure, command])
    return lines


def criteria_rows() -> list[list[str]]:
    r = load("criteria_smollm2.json")
    what = "one layer at a time, WikiText-2 validation: orthogonal better than inverse"
    margins = [layer["margin"] for layer in r["layers"].values()]
    figure = f"in {sum(m > 0 for m in margins)} of {len(margins)} layers, by {min(margins):.1%} to {max(margins):.1%}"
    command = "`python benchmarks/bench_criteria.py`, all of it in [docs/criteria.md](docs/criteria.md)"
    rows = r["table3"]["rows"]
    names = ("full method", "pre-norm states", "random, seed 0", "inverse", "K and V of selected tokens only")
    ablation = ", ".join(f"{name} {rows[name]['perplexity']:.1f}" for name in names)
    return [
        [what, figure, command],
        ["perplexity on C4 documents, the shipped plan's layers, every row of the paper's Table 3", ablation, command],
    ]


def search_rows() -> list[list[str]]:
    r = load("search_smollm2.json")
    wall = r["wall_ratio"]
    return [
        [
            f"layer search on SmolLM2, {r['rounds']} rounds, {r['windows']} windows of {r['seq_len']} tokens: time of "
            "SLEB's plain loop over that of the exact search (same plan, same bits of every loss) and of `--fast`",
            f"{wall['exact']:.2f}x and {wall['fast']:.2f}x; fast plan's loss {r['fast_loss_above_exact']:+.4f} nats",
            "`python benchmarks/bench_search.py`, more in [docs/search.md](docs/search.md)",
        ]
    ]


def mode_rows() -> list[list[str]]:
    found = load("modes_smollm2.json")["variants"]
    names = ("topk", "window 256", "threshold")
    return [
        [
            "perplexity on WikiText-2 test, shipped plan, by selection mode",
            ", ".join(f"{name} {found[name]['perplexity']:.1f}" for name in names),
            "`python benchmarks/bench_modes.py`, more in [docs/modes.md](docs/modes.md)",
        ]
    ]


def import_rows() -> list[list[str]]:
    r = load("import.json")
    figure = f"{r['orthorank_kernels']['wall_ms']:.0f} ms on top of `import torch`"
    return [
        [
            "`import orthorank_kernels`",
            figure,
            "`python benchmarks/bench_import.py --json benchmarks/results/import.json`",
        ]
    ]


def reproduce_section() -> str:
    """The paper's main rows and claims on SmolLM2."""
    summary = load(f"{readme_reproduce.FOLDER}/summary.json")
    rows, claims = readme_reproduce.main_rows(summary), readme_reproduce.claim_rows(summary)
    corrected = readme_reproduce.corrected_note(summary)
    return f"{table(*rows)}\n\n{table(*claims)}\n\n{readme_reproduce.note(summary)}\n\n{corrected}"


def gpu_section() -> str:
    """Tables of the GPUs that were measured, or that there are none."""
    return readme_gpu.section(RESULTS)


def in_docs(text: str) -> str:
    """``text`` with links as a page of the documentation has them; result files are not among its pages."""
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"\[[^\]]+\]\((benchmarks/[^)]+)\)", r"`\1`", text)


def gpu_limits() -> str:
    """The same on a page of the documentation, whose links begin elsewhere."""
    return readme_gpu.section(RESULTS, docs="")


# By page: its marked sections, and what makes them.
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "frontier-front": readme_front.front_section,
        "paper": readme_front.paper_section,
        "gpu": gpu_section,
    },
    "docs/results.md": {
        "demo": demo_section,
        "reproduce": lambda: in_docs(reproduce_section()),
        "results": lambda: in_docs(results_section()),
    },
    "docs/limits.md": {"gpu": gpu_limits},
    "docs/correction-results.md": {
        "correction": readme_docs.correction_section,
        "frontier": readme_docs.frontier_section,
        "zeroshot": readme_docs.zeroshot_section,
        "retrieval": readme_docs.retrieval_section,
    },
    "docs/criteria.md": {"criteria": readme_docs.criteria_section},
    "docs/modes.md": {"modes": readme_docs.modes_section, "multiple": readme_docs.multiple_section},
    "docs/padding.md": {"pooled": readme_docs.pooled_section},
    "docs/vllm.md": {"chat": readme_docs.chat_section},
    "docs/search.md": {
        "search": readme_docs.search_section,
        "search-corrected": readme_docs.search_corrected_section,
    },
}


def rewritten(page: str, text: str) -> str:
    """``text`` of ``page`` with its marked sections made anew."""
    for name, make in PAGES[page].items():
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text, found = re.subn(pattern, lambda m, make=make: f"{m[1]}\n{make()}\n\n{m[2]}", text, flags=re.DOTALL)
        if not found:
            raise SystemExit(f"{page} has no section <!-- {name}:begin -->")
    return text


def main() -> int:
    stale = False
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        fresh = rewritten(page, text)
        if "--check" in sys.argv[1:]:
            if fresh != text:
                print(f"{page} is out of date; run: python benchmarks/readme.py")
                stale = True
        else:
            path.write_text(fresh, encoding="utf-8")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
