"""`orthorank.packed.operator`: outputs written where the caller put them, opaque to compilers."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.passes.split_module import split_module

from orthorank.packed import operator
from orthorank.packed.operator import decoder_layer

OP = torch.ops.orthorank.decoder_layer


class Twice:
    """Hidden twice, residual with the positions added. Counts how often it ran."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor, self.runs = factor, 0

    def run(
        self, positions: Tensor, hidden: Tensor, residual: Tensor, out_hidden: Tensor, out_residual: Tensor
    ) -> None:
        assert not any(isinstance(x, torch._subclasses.FakeTensor) for x in (hidden, out_hidden)), "traced"
        self.runs += 1
        torch.mul(hidden, self.factor, out=out_hidden)
        torch.add(residual, positions[:, None], out=out_residual)


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Twice]:
    monkeypatch.setattr(operator, "_find", operator._find)  # puts back what the test changes
    found = {"model.layers.1": Twice(), "model.layers.2": Twice(3.0)}
    operator.find_layers_by(found.__getitem__)
    return found


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(tokens: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.arange(tokens), *(torch.randn(tokens, 8, generator=generator) for _ in range(2))


def test_outputs_are_written_in_place(layers: dict[str, Twice]) -> None:
    """What was captured behind the operator reads fixed addresses: views taken before see what it writes."""
    positions, hidden, residual = inputs()
    outs = torch.full((5, 8), torch.nan), torch.full((5, 8), torch.nan)
    behind, addresses = [out.flatten()[::3] for out in outs], [out.data_ptr() for out in outs]
    before = hidden.clone(), residual.clone()
    for run in (1, 2):
        assert OP(positions, hidden * run, residual, *outs, "model.layers.1") is None
        assert [out.data_ptr() for out in outs] == addresses
        assert torch.equal(outs[0], 2 * run * hidden)
        assert torch.equal(behind[0], (2 * run * hidden).flatten()[::3])
        assert torch.equal(behind[1], (residual + positions[:, None]).flatten()[::3])
    assert torch.equal(hidden, before[0])
    assert torch.equal(residual, before[1])


def test_both_outputs_are_new(layers: dict[str, Twice]) -> None:
    positions, hidden, residual = inputs()
    found = decoder_layer(positions, hidden, residual, "model.layers.2")
    assert torch.equal(found[0], 3 * hidden)
    assert torch.equal(found[1], residual + positions[:, None])
    memory = [x.untyped_storage().data_ptr() for x in (hidden, residual, *found)]
    assert len(set(memory)) == 4
    wide = torch.randn(5, 3, 8)
    for x in (wide[:, 1], wide[:, 0].T.contiguous().T, wide[0].expand(5, 3, 8)[:, 1]):
        assert all(out.is_contiguous() for out in decoder_layer(positions, x, x, "model.layers.1"))


def test_the_schema_says_what_is_written(layers: dict[str, Twice]) -> None:
    written = {argument.name for argument in OP.default._schema.arguments if argument.is_write}
    assert written == {"out_hidden", "out_residual"}
    assert OP.default._schema.returns == []
    outs = torch.empty(5, 8), torch.empty(5, 8)
    for tokens in (5, 0):
        given = inputs(tokens)
        torch.library.opcheck(OP, (*given, *(x[:tokens] for x in outs), "model.layers.1"))


@pytest.mark.parametrize(("key", "has"), [("CPU", True), ("CUDA", True), ("Meta", True), ("AutogradCPU", False)])
def test_where_it_runs(key: str, has: bool) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("orthorank::decoder_layer", key) is has


def test_gradients_stop_there(layers: dict[str, Twice]) -> None:
    positions, hidden, residual = inputs()
    hidden.requires_grad_(True)
    with torch.no_grad():
        assert not any(out.requires_grad for out in decoder_layer(positions, hidden, residual, "model.layers.1"))


def test_a_name_that_is_not_there(layers: dict[str, Twice]) -> None:
    with pytest.raises(KeyError, match=r"model\.layers\.9"):
        decoder_layer(*inputs(), "model.layers.9")


def test_nobody_said_where_the_layers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "_find", operator._nothing_found)
    with pytest.raises(LookupError, match=r"no layer is named 'model\.layers\.1': nothing said where"):
        decoder_layer(*inputs(), "model.layers.1")


def two_layers(positions: Tensor, hidden: Tensor, residual: Tensor) -> Tensor:
    hidden, residual = hidden + 1, residual * 2
    hidden, residual = decoder_layer(positions, hidden, residual, "model.layers.1")
    hidden = hidden.relu()
    hidden, residual = decoder_layer(positions, hidden, residual, "model.layers.2")
    return hidden + residual


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(layers: dict[str, Twice], fresh: None, backend: str) -> None:
    """One graph, never looked into; another number of tokens, and another layer's doing, need no new one."""
    compiled = torch.compile(two_layers, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (5, 9):
        torch.testing.assert_close(compiled(*inputs(tokens)), two_layers(*inputs(tokens)))
    layers["model.layers.1"].factor = 7.0
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(*inputs(9)), two_layers(*inputs(9)))
    assert {name: layer.runs for name, layer in layers.items()} == dict.fromkeys(layers, 6)


def test_the_compiled_graph_has_the_operator_and_its_buffers(layers: dict[str, Twice], fresh: None) -> None:
    """`empty_like` before it, in the part of the graph that a stack captures, and the operator by its name."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compile(two_layers, fullgraph=True, backend=keep)(*inputs())
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert len(graphs) == 1
    assert sum("decoder_layer" in target for target in targets) == 2
    assert sum("empty_like" in target for target in targets) == 4


class Parts(torch.fx.Interpreter):
    """Runs a split graph and notes the memory that each part takes and gives."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.ran: list[tuple[str, list[int], list[int]]] = []

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_module(target, args, kwargs)
        given = result if isinstance(result, (tuple, list)) else (result,)
        self.ran.append((target, addresses(args), addresses(given)))
        return result


def addresses(values: Any) -> list[int]:
    return [x.data_ptr() for x in values if isinstance(x, Tensor)]


def split_at_operators(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Every operator a part of its own, as stacks do before they capture the others."""
    part_of: dict[torch.fx.Node, int] = {}
    part = 0
    for node in graph.graph.nodes:
        border = "decoder_layer" in str(node.target)
        part += border
        part_of[node] = part
        part += border
    return split_module(graph, None, part_of.__getitem__, keep_original_order=True)


def test_a_split_graph_writes_into_buffers_of_the_part_before(layers: dict[str, Twice], fresh: None) -> None:
    """And the part behind reads them where they are: replayed, it would read the same addresses."""
    ran: list[tuple[str, list[int], list[int]]] = []

    def in_parts(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            parts = Parts(split_at_operators(graph))
            result = parts.run(*args)
            ran.extend(parts.ran)
            return result

        return run

    found = torch.compile(two_layers, fullgraph=True, backend=in_parts)(*inputs())
    torch.testing.assert_close(found, two_layers(*inputs()))
    assert [target for target, _, _ in ran] == [f"submod_{i}" for i in range(5)]
    for at in (1, 3):
        (_, _, made), (_, taken, given), (_, read, _) = ran[at - 1 : at + 2]
        assert given == [], "the operator returns nothing"
        buffers = set(made) & set(taken) & set(read)
        assert len(buffers) == 2
