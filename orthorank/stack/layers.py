"""The model as a stack of layers, for search and analysis: run any layer on any states, dense, selecting or removed."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orthorank.calls.context import ForwardContext
from orthorank.calls.reading import Phase, read_call
from orthorank.common.errors import OrthoRankError
from orthorank.common.patching import Patch, forward_of
from orthorank.config import OrthoRankConfig
from orthorank.families.intact import TakenApart
from orthorank.families.known import TESTED, decoder_of, device_of, family_of, layers_of
from orthorank.families.parts import Parts
from orthorank.hf.criteria import norm_and_rank
from orthorank.hf.layer import selected_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from orthorank.correction import LayerMap

_RECORDS = ("transformers_version", "dtype", "torch_dtype", "name_or_path", "architectures", "use_cache")
_SAMPLED = 64  # elements of each weight that the model's fingerprint reads
LOGITS_AT_ONCE = 2**26  # elements: 256 MiB of fp32 logits


@dataclass(frozen=True)
class Pass:
    """What enters the first layer, and what the model hands to each layer beside it.

    Args:
        hidden_states: ``[windows, tokens, hidden]``.
        layer_kwargs: per layer: position_embeddings, attention_mask and the like.
        call: where padding is.
    """

    hidden_states: Tensor
    layer_kwargs: list[dict[str, Any]]
    call: ForwardContext


class LayerStack:
    """The decoder layers of ``model`` one at a time, without a cache.

    The model is left as it is: nothing is patched between two calls. Gradients are recorded by `run` alone, and only
    where ``records_gradients`` is set.

    Raises:
        OrthoRankError: the family is unknown, or a plan is applied to the model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)).eval()
        >>> stack, ids = LayerStack(model), torch.arange(8)[None]
        >>> inputs = stack.embed(ids)
        >>> h = stack.run(1, stack.run(0, inputs.hidden_states, inputs), inputs)
        >>> torch.allclose(stack.logits(h), model(ids).logits, atol=1e-5)
        True
    """

    records_gradients = False

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model
        self.decoder: Any = decoder_of(model)
        self.family = family_of(model)
        if model.config.get_text_config().model_type not in TESTED:
            from orthorank.hf.family_check import checked_family

            self.family = checked_family(model)
        if isinstance(forward_of(self.decoder), Patch):  # where a plan stands
            raise OrthoRankError("a plan is applied to this model; call handle.remove() first")
        self.layers: list[Any] = layers_of(model)
        self.parts: list[Parts] = [Parts.of(self.family, layer) for layer in self.layers]
        self._taken_apart: dict[int, TakenApart] = {}

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return len(self.parts)

    @torch.no_grad()
    def embed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Pass:
        """What the layers get for ``input_ids`` ``[windows, tokens]``: the model's own forward, with idle layers.

        Args:
            attention_mask: ``[windows, tokens]``, 1 for tokens and 0 for padding on either side; None: no padding.
        """
        call = read_call(
            (input_ids.shape[0], input_ids.shape[1]), input_ids.device, Phase(), {"attention_mask": attention_mask}
        )
        seen: list[tuple[Tensor, dict[str, Any]]] = []

        def idle(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            seen.append((hidden_states, kwargs))
            return hidden_states

        with ExitStack() as undone:
            for layer in self.decoder.layers:
                undone.enter_context(_standing_in(layer, idle))
            self.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return Pass(seen[0][0], [kwargs for _, kwargs in seen], call)

    def run(
        self,
        layer: int,
        hidden_states: Tensor,
        inputs: Pass,
        keep_ratio: float = 1.0,
        criterion: str = "orthogonal",
        layer_map: "LayerMap | None" = None,
        **options: Any,
    ) -> Tensor:
        """One layer on ``hidden_states`` ``[windows, tokens, hidden]``, which it leaves as they are.

        Args:
            layer: its number; inputs: from `embed`, of the same windows.
            hidden_states: on any device; the output is where the layer runs.
            keep_ratio: 1 = the dense layer, 0 = removed, between = token selection by ``criterion``.
            layer_map: what it adds to tokens that it leaves out, or None.
            options: further fields of `OrthoRankConfig` that say how tokens are selected: seed, kv, update_sink, sinks
                and so on.

        Raises:
            OrthoRankError: criterion or an option is one that a plan may not have, or the layer cannot be taken apart
                (see `orthorank.families.intact`).
        """
        device = device_of(self.layers[layer])
        with torch.set_grad_enabled(self.records_gradients and torch.is_grad_enabled()):
            if keep_ratio == 0:
                if layer_map is None:
                    return hidden_states
                from orthorank.hf.correction import corrected  # corrected plans alone need it

                given = hidden_states.to(device)
                return corrected(given, self.parts[layer].input_norm(given), inputs.call.on(device), layer_map)
            of_layer, kwargs = self.layers[layer], _on(device, inputs.layer_kwargs[layer])
            with ExitStack() as undone:
                if keep_ratio != 1:
                    plan = OrthoRankConfig(layers=[layer], keep_ratio=keep_ratio, criterion=criterion, **options)
                    call = replace(inputs.call, update_sink=plan.update_sink, multiple=plan.keep_multiple).on(device)
                    select = partial(selected_forward, self._apart(layer), layer, plan, call, layer_map=layer_map)
                    # called as a layer of a patched model is, with all its hooks
                    undone.enter_context(_standing_in(of_layer, lambda h, **kw: select(h, kw["position_embeddings"])))
                output = of_layer(hidden_states.to(device), **kwargs)
            return output[0] if isinstance(output, tuple) else output

    def _apart(self, layer: int) -> Parts:
        """The parts of a layer that is to be run from them, looked at anew."""
        beneath, found = forward_of(self.layers[layer]), self._taken_apart.get(layer)
        if found is None or found.beneath is not beneath:
            found = self._taken_apart[layer] = TakenApart(self.family, self.layers[layer], layer, beneath)
        return found.check()

    @torch.no_grad()
    def ranks(
        self, layer: int, hidden_states: Tensor, inputs: Pass, criterion: str = "orthogonal", **options: Any
    ) -> Tensor:
        """What ``layer`` ranks the tokens by, the smallest first: float32 ``[windows, tokens]``.

        Arguments as for `run`. The sinks' ranks mean nothing.
        """
        device = device_of(self.layers[layer])
        plan = OrthoRankConfig(layers=[layer], criterion=criterion, **options)
        hidden_states = hidden_states.to(device)
        with self.parts[layer].input_norm.applied(hidden_states) as (normed, norm):
            return norm_and_rank(
                plan, layer, inputs.call.on(device), hidden_states, norm, given=normed, parts=self.parts[layer]
            )[1]

    @torch.no_grad()
    def normed(self, layer: int, hidden_states: Tensor) -> Tensor:
        """The layer's input norm of ``hidden_states``: where tokens are scored."""
        return self.parts[layer].input_norm(hidden_states)

    @torch.no_grad()
    def logits(self, hidden_states: Tensor) -> Tensor:
        """Final norm and language-model head: ``[windows, tokens, hidden]`` to ``[windows, tokens, vocabulary]``.

        The model's own path, with the factors and caps that some models have behind the head.
        """
        return self.logits_with_gradient(hidden_states)

    def logits_with_gradient(self, hidden_states: Tensor) -> Tensor:
        """As `logits`, with a gradient where grad mode is on."""
        return self._head(self.decoder.norm(hidden_states))

    @torch.no_grad()
    def token_losses(self, hidden_states: Tensor, input_ids: Tensor) -> Tensor:
        """Cross entropy in nats of each next token, fp32 ``[windows, tokens - 1]``."""
        return torch.cat(list(self.loss_parts(hidden_states, input_ids))).view(input_ids.shape[0], -1)

    @torch.no_grad()
    def loss_parts(self, hidden_states: Tensor, input_ids: Tensor) -> Iterator[Tensor]:
        """The same, slice by slice of ``[windows * (tokens - 1)]``; the logits exist for one slice at a time."""
        windows, tokens, _ = hidden_states.shape
        states = self.decoder.norm(hidden_states)[:, :-1].reshape(windows * (tokens - 1), -1)
        targets = input_ids[:, 1:].reshape(-1)
        step = max(1, LOGITS_AT_ONCE // self.model.config.get_text_config().vocab_size)
        for i in range(0, len(targets), step):
            logits = self._head(states[None, i : i + step])[0].float()
            yield nn.functional.cross_entropy(logits, targets[i : i + step].to(logits.device), reduction="none")

    def loss_gradient(self, hidden_states: Tensor, input_ids: Tensor) -> Tensor:
        """Gradient of the summed `token_losses` with respect to ``hidden_states``, in its shape and dtype.

        As there, the logits exist for a slice of tokens at a time.
        """
        windows, tokens, width = hidden_states.shape
        states = hidden_states[:, :-1].reshape(windows * (tokens - 1), width)
        targets = input_ids[:, 1:].reshape(-1)
        step = max(1, LOGITS_AT_ONCE // self.model.config.get_text_config().vocab_size)
        gradient = torch.zeros_like(hidden_states)
        parts: list[Tensor] = []
        for i in range(0, len(targets), step):
            with torch.enable_grad():
                part = states[i : i + step].detach().requires_grad_()
                logits = self._head(self.decoder.norm(part)[None])[0].float()
                loss = nn.functional.cross_entropy(logits, targets[i : i + step].to(logits.device), reduction="sum")
                parts += torch.autograd.grad(loss, part)
        gradient[:, :-1] = torch.cat(parts).view(windows, tokens - 1, width)
        return gradient

    def _head(self, normed: Tensor) -> Tensor:
        """What the model's own forward makes of the decoder's output ``[windows, tokens, hidden]``."""
        from transformers.modeling_outputs import MoeModelOutputWithPast  # every causal LM finds its fields in it

        known = MoeModelOutputWithPast(last_hidden_state=normed)
        with _standing_in(self.decoder, lambda *_, **__: known):
            return self.model(inputs_embeds=normed, use_cache=False, return_dict=True).logits


def model_fingerprint(model: "PreTrainedModel") -> str:
    """A hash of the model's weights: names, shapes, dtypes and the first elements of each.

    It tells a model from its fine-tuned sister without reading gigabytes. Weights that are kept elsewhere (offloaded)
    count by name and shape alone.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta":
            some = weight.detach().reshape(-1)[:_SAMPLED].to("cpu", torch.float32).contiguous()
            digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]


def config_fingerprint(model: "PreTrainedModel") -> str:
    """A hash of the model's configuration: what its weights compute by, such as a rotary base.

    Paths, dtypes (of which the weights say more) and versions do not count.
    """
    text = json.dumps(_without_records(model.config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_records(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {str(k): _without_records(v) for k, v in value.items() if k not in _RECORDS and not str(k).startswith("_")}


def _on(device: torch.device, value: Any) -> Any:
    """``value`` with the tensors in it on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _on(device, item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_on(device, item) for item in value)
    return value


class _StandIn(Patch):
    """A function in place of a module's forward."""

    run: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


@contextmanager
def _standing_in(module: Any, run: Callable[..., Any]) -> Iterator[None]:
    """Inside, ``run`` is the forward of ``module``."""
    patch = _StandIn(module, "forward")
    patch.run = run
    try:
        yield
    finally:
        patch.undo()
