"""What a caller hands over: the page's code runs, and a batch that looks padded without a mask is warned of, once."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

import orthorank
from orthorank import OrthoRankConfig
from tests.orthorank.models import tiny
from tests.orthorank.statement import assert_close

PAGE = Path(__file__).parents[3] / "docs" / "padding.md"
PLAN = OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3)
WORDS = "was called without an attention mask, and row"


def ids_of(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 120, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def test_the_code_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    with pytest.warns(UserWarning, match=f"{WORDS} 0 ends in 14 equal tokens"):
        exec(compile(blocks[0], "docs/padding.md, block 0", "exec"), names)
    for number, block in enumerate(blocks[1:], 1):
        exec(compile(block, f"docs/padding.md, block {number}", "exec"), names)
    assert capsys.readouterr().out == "True\n", "of embeddings: nearer to the dense model's"


def test_right_padding_with_a_mask_is_the_row_alone_and_without_it_is_said() -> None:
    model, row = tiny("llama-3"), ids_of(1, 10)
    padded = pad(row, (0, 14))
    with orthorank.apply(model, PLAN), torch.no_grad():
        alone = model(row).logits
        assert_close(model(padded, attention_mask=(padded != 0).long()).logits[:, :10], alone)
        with pytest.warns(UserWarning, match=f"{WORDS} 0 ends in 14 equal tokens: if they are padding, pass"):
            without = model(padded).logits[:, :10]
        assert (without - alone).abs().max() > 0.1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(padded)  # once


def test_a_classifier_is_warned_and_right_with_its_mask() -> None:
    from transformers import LlamaForSequenceClassification

    config = tiny("llama-2").config
    config.num_labels, config.pad_token_id = 3, 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config).eval()
    rows = [ids_of(1, 24, 1), ids_of(1, 9, 2)]
    batch = torch.cat([pad(row, (0, 24 - row.shape[1])) for row in rows])
    with orthorank.apply(model, PLAN), torch.no_grad():
        alone = torch.cat([model(row).logits for row in rows])
        assert_close(model(batch, attention_mask=(batch != 0).long()).logits, alone)
        with pytest.warns(UserWarning, match=f"{WORDS} 1 ends in 15 equal tokens"):
            assert (model(batch).logits - alone).abs().max() > 1e-3


def test_embeddings_and_a_bare_decoder() -> None:
    model = tiny("llama-2")
    padded = pad(ids_of(2, 12), (0, 5))
    with orthorank.apply(model, PLAN), torch.no_grad(), pytest.warns(UserWarning, match=f"{WORDS} 0 ends in 5 equal"):
        model(inputs_embeds=model.get_input_embeddings()(padded))
    with orthorank.apply(model, PLAN), torch.no_grad(), pytest.warns(UserWarning, match=f"{WORDS} 0 ends in 5 equal"):
        model.model(padded)


@pytest.mark.parametrize(
    ("ends", "warned"),
    [
        ([0], True),  # the model's padding token, once
        ([0, 0], True),
        ([2], False),  # an end of the text
        ([7, 7, 7], False),  # three equal tokens, as in text
        ([7, 7, 7, 7], True),
    ],
)
def test_what_looks_like_padding(ends: list[int], warned: bool) -> None:
    model, row = tiny("llama-2"), ids_of(1, 12)
    row[0, -1] = 5
    ids = torch.cat([row, torch.tensor([ends])], dim=1)
    with orthorank.apply(model, PLAN), torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model(ids)
    assert [WORDS in str(one.message) for one in said] == [True] * warned


def test_where_the_end_of_text_is_the_padding_one_of_it_is_no_padding() -> None:
    model, row = tiny("llama-2"), ids_of(1, 12)
    model.config.pad_token_id = model.config.eos_token_id
    for ends, warned in (([2], False), ([2, 2], True)):
        with orthorank.apply(model, PLAN), torch.no_grad(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model(torch.cat([row, torch.tensor([ends])], dim=1))
        assert len(said) == warned


def test_what_is_not_warned_of() -> None:
    """A mask, a plan that ranks nothing, a row of one token alone, `generate()`, `context()`, a decode step."""
    model, padded = tiny("llama-2"), pad(ids_of(2, 12), (0, 5))
    mask = (padded != 0).long()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with orthorank.apply(model, PLAN):
            model(padded, attention_mask=mask)
            model(torch.full((1, 12), 7))
            with orthorank.context(model, [12, 12]):
                model(padded)
            model.generate(padded, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
            out = model(ids_of(1, 12), use_cache=True)
            model(torch.tensor([[0]]), past_key_values=out.past_key_values)
        with orthorank.apply(model, OrthoRankConfig(layers=[1], keep_ratio=0)):
            model(padded)


def test_a_copy_of_a_patched_model_warns_for_itself() -> None:
    import copy

    model, padded = tiny("llama-2"), pad(ids_of(1, 12), (0, 5))
    with orthorank.apply(model, PLAN), torch.no_grad():
        own = copy.deepcopy(model)
        for each in (model, own):
            with pytest.warns(UserWarning, match=WORDS):
                each(padded)
