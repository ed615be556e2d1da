"""Prompts from a file: one a line, JSON lines, or a log of requests to a server."""

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthorank.common.errors import OrthoRankError, check_integer
from orthorank.common.files import from_json, read_text
from orthorank.evaluation.answers import with_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ARRAY = re.compile(r"\[\s*(?:[{\"\]]|$)")  # a JSON array, and no [INST] of a template


@dataclass(frozen=True)
class Prompt:
    """What a model is to go on from.

    Args:
        text: as it is. messages: of a chat instead, each with ``role`` and ``content``, for the tokenizer's template.
        tokens: token ids instead, as they are.
    """

    text: str
    messages: tuple[dict[str, str], ...] = ()
    tokens: tuple[int, ...] = ()

    def ids(self, tokenizer: "PreTrainedTokenizerBase", bos: str = "auto") -> list[int]:
        """The prompt in tokens; ``bos`` as for `orthorank.evaluation.answers.with_bos`.

        Raises:
            OrthoRankError: there are messages, and the tokenizer has no template, or one that refuses them.
        """
        if self.tokens:
            return list(self.tokens)
        if not self.messages:
            return with_bos(list(tokenizer(self.text, verbose=False)["input_ids"]), tokenizer, bos)
        if not getattr(tokenizer, "chat_template", None):
            raise OrthoRankError("messages are given and the tokenizer has no chat template; give prompts as text")
        try:
            made = tokenizer.apply_chat_template(list(self.messages), add_generation_prompt=True, return_dict=True)
        except Exception as error:  # whatever a template raises
            said = f"the tokenizer's chat template refuses the messages {self.text!r}: {error}"
            raise OrthoRankError(said) from error
        return with_bos(list(made["input_ids"]), tokenizer, bos)


def read_prompts(path: str | Path, sample: int | None = None) -> list[Prompt]:
    """The prompts in a file: JSON lines if its name ends in ``.jsonl`` or it begins with ``{``, else one a line.

    Args:
        path: UTF-8. A line of JSON has ``prompt``, a text or token ids, or ``messages``, a list of
            ``{"role": .., "content": ..}``, or has these in ``body``, as logs of requests to a server do; further keys
            do not matter. Empty lines are left out.
        sample: so many of the prompts, drawn at random, the same ones each time, lines that are none left out; None:
            all. Where there are fewer, all of them.

    Raises:
        OrthoRankError: it cannot be read, has no prompt, or (without ``sample``) a line is none.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "prompts.txt"
        >>> _ = file.write_text("The river\\n\\nThe bridge\\n")
        >>> read_prompts(file)
        [Prompt(text='The river', messages=(), tokens=()), Prompt(text='The bridge', messages=(), tokens=())]
    """
    return sample_prompts(path, sample)[0]


def sample_prompts(path: str | Path, sample: int | None = None) -> tuple[list[Prompt], int]:
    """As `read_prompts`, with how many lines of the file are no prompts and were left out."""
    if sample is not None:
        check_integer("sample", sample, 1)
    lines, are_json = _lines(path)
    prompts: list[tuple[int, Prompt]] = []
    errors: list[OrthoRankError] = []
    for number, line in lines:
        try:
            prompts.append((number, _parsed(f"line {number} of {str(path)!r}", line) if are_json else Prompt(line)))
        except OrthoRankError as error:
            if sample is None:
                raise
            errors.append(error)
    if not prompts:
        raise errors[0]
    if sample is not None:
        drawn = random.Random(0).sample(range(len(prompts)), min(sample, len(prompts)))
        prompts = [prompts[i] for i in sorted(drawn)]
    return [prompt for _, prompt in prompts], len(errors)


def _lines(path: str | Path) -> tuple[list[tuple[int, str]], bool]:
    """The lines of the file that are not empty, each with its number, and whether they are JSON."""
    content = read_text("prompts", path).split("\n")
    lines = [(number, line.strip()) for number, line in enumerate(content, 1) if line.strip()]
    if not lines:
        raise OrthoRankError(f"prompts {str(path)!r} is empty; give one prompt a line")
    if _ARRAY.match(lines[0][1]):
        raise OrthoRankError(
            f"prompts {str(path)!r} begins a JSON array; give JSON lines, one object a line, without [ and "
            "commas, as jq -c '.[]' writes them"
        )
    return lines, Path(path).suffix == ".jsonl" or lines[0][1].startswith("{")


def _parsed(where: str, line: str) -> Prompt:
    try:
        row = from_json(line)
    except ValueError as error:
        raise OrthoRankError(f"{where} is broken JSON: {error}; give one JSON object a line") from error
    prompt = _prompt_of(row.get("body", row)) if isinstance(row, dict) else None
    if prompt is None:
        raise OrthoRankError(
            f"{where} is no prompt; it must be a JSON object with prompt, a text or a list of token ids, or with "
            "messages, a list of objects with role and content (not with both), or have such an object as its body"
        )
    try:
        prompt.text.encode()
    except UnicodeEncodeError as error:
        raise OrthoRankError(
            f"{where} has half of a character, {error.object[error.start]!a}, which stands for nothing alone; write "
            "its pair, or leave it out"
        ) from error
    return prompt


def _prompt_of(row: Any) -> Prompt | None:
    """The prompt in a JSON object, None where it has none, or two."""
    if not isinstance(row, dict) or ("messages" in row) == ("prompt" in row):
        return None
    if "prompt" in row:
        given = row["prompt"]
        if isinstance(given, str) and given:
            return Prompt(given)
        if isinstance(given, list) and given and all(type(token) is int for token in given):
            return Prompt(f"{len(given)} token ids", tokens=tuple(given))
        return None
    given = row["messages"]
    if not isinstance(given, list) or not given:
        return None
    if not all(isinstance(each, dict) and isinstance(each.get("content"), str) and "role" in each for each in given):
        return None
    messages = tuple({"role": str(each["role"]), "content": each["content"]} for each in given)
    return Prompt("\n".join(f"{each['role']}: {each['content']}" for each in messages), messages)
