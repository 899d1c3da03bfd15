"""Text to ids: where the prompt ends, what is trained on, and what did not fit.

A row is ``prompt + answer + end``; cross-entropy sees the answer and its end token only. Formats:

    qa        ``Question: {prompt}\\nAnswer: {answer}`` and the eos token
    template  the user's own text around ``{prompt}`` and ``{answer}``, and the eos token
    chat      the tokenizer's chat template; trained on is the last reply with its end token, and
              its thoughts where the template opens a thinking block for it

A document (an example without prompt) is trained on whole, with eos after it, whatever the format.
The prompt's ids never depend on the answer: generation starts from exactly the ids that were
trained on. Left out on purpose: few-shot prompts, packing, and batches (see ``batches``).
"""

import math
import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Int32

from kava_jax.data.example import Example
from kava_jax.errors import KavaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QA_TEMPLATE = "Question: {prompt}\nAnswer: {answer}"
Format = Literal["qa", "template", "chat"]

_PROMPT_NAMES = ("prompt", "question")


class Encoded(NamedTuple):
    """One row of ids. The first ``prompt_length`` ids are read but not trained on."""

    ids: Int32[np.ndarray, "T"]
    prompt_length: int
    truncated: bool

    @property
    def has_loss(self) -> bool:
        """Whether any id is a target; a row's first id never is, as nothing comes before it."""
        return len(self.ids) > max(self.prompt_length, 1)


class _Parts(NamedTuple):
    """A row as text, with the end token in ``completion`` only if ``ended``."""

    prompt: str
    completion: str
    ended: bool


class Encoder:
    """Turns examples into ids, in one of the formats of this module.

    Args:
        tokenizer: a fast or slow ``transformers`` tokenizer with an eos token.
        format: ``qa``, ``template`` or ``chat``.
        template: for ``template`` only; text with ``{prompt}`` (or ``{question}``) before one
            ``{answer}``. Spaces right before ``{answer}`` are read with the answer, as BPE does.
        max_length: longest row in ids.

    Raises:
        KavaError: the template is malformed, the tokenizer has no eos token or no chat template,
            or ``max_length`` is below 2.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        format: Format = "qa",
        template: str | None = None,
        max_length: int = 512,
    ):
        if max_length < 2:
            raise KavaError(
                f"data.max_length={max_length} leaves nothing to predict; use 2 or more"
            )
        if tokenizer.eos_token_id is None:
            raise KavaError("the tokenizer has no eos token, so no answer could end; set eos_token")
        if (format == "template") != (template is not None):
            raise KavaError(
                f"data.format={format!r} with data.template={template!r}; a template is needed by "
                "data.format=template and allowed nowhere else"
            )
        if format == "chat" and not tokenizer.chat_template:
            raise KavaError(
                "data.format='chat' needs a tokenizer with a chat template and this one has none; "
                "use data.format=qa or an instruct model's tokenizer"
            )
        if format not in ("qa", "template", "chat"):
            raise KavaError(f"data.format={format!r} is unknown; use qa, template or chat")
        self.tokenizer = tokenizer
        self.format = format
        self.max_length = max_length
        self._special = frozenset(tokenizer.all_special_ids)
        self._before, self._after = _split_template(template or QA_TEMPLATE)
        # Special tokens are placed by hand: what a tokenizer adds by itself differs by family.
        added = tokenizer("")["input_ids"]
        self._bos = [b for b in added[:1] if b == tokenizer.bos_token_id]

    def encode(self, example: Example) -> Encoded:
        """One row (a document too), cut at ``max_length``; ``truncated`` then says so."""
        return self._rows([example])[0]

    def encode_prompt(self, example: Example) -> Int32[np.ndarray, "T"]:
        """The ids before the answer, for generation; never cut.

        Raises:
            KavaError: the example is a document, which has no prompt.
        """
        if _is_document(example):
            raise KavaError(
                "a plain document has no prompt to answer; use a question/answer source"
            )
        return np.array(self._prompt_ids([self._parts(example)])[0], np.int32)

    def encode_all(self, examples: Sequence[Example]) -> list[Encoded]:
        """All rows. A document longer than ``max_length`` becomes several rows of even length.

        Rows whose prompt alone fills ``max_length`` are kept here with ``has_loss`` False; the
        batches drop and count them.
        """
        rows = self._rows(examples, cut_documents=False)
        return [window for row in rows for window in self._windows(row)]

    def _rows(self, examples: Sequence[Example], cut_documents: bool = True) -> list[Encoded]:
        examples = list(examples)  # a generated sequence would be generated once per pass
        parts = [self._parts(example) for example in examples]
        prompts = self._prompt_ids(parts)
        wholes = self._ids([part.prompt + part.completion for part in parts])
        rows = []
        for example, part, prompt, whole in zip(examples, parts, prompts, wholes, strict=True):
            whole = self._start(part) + whole
            if whole[: len(prompt)] != prompt:
                # The boundary falls inside a merge, so the answer is tokenized on its own.
                whole = prompt + self._ids([part.completion])[0]
            if not (part.ended and whole[-1] in self._special):
                whole = [*whole, self.tokenizer.eos_token_id]
            document = _is_document(example)
            limit = None if document and not cut_documents else self.max_length
            ids = np.array(whole[:limit], np.int32)
            length = 0 if document else min(len(prompt), len(ids))
            rows.append(Encoded(ids, length, len(ids) < len(whole)))
        return rows

    def _windows(self, row: Encoded) -> list[Encoded]:
        if len(row.ids) <= self.max_length:
            return [row]
        pieces = np.array_split(row.ids, math.ceil(len(row.ids) / self.max_length))
        return [Encoded(piece, 0, False) for piece in pieces]

    def _start(self, part: _Parts) -> list[int]:
        return [] if part.ended else self._bos  # a chat template writes its own BOS

    def _prompt_ids(self, parts: list[_Parts]) -> list[list[int]]:
        ids = self._ids([part.prompt for part in parts])
        return [self._start(part) + row for part, row in zip(parts, ids, strict=True)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _parts(self, example: Example) -> _Parts:
        if _is_document(example):
            return _Parts("", example.answer, False)
        if self.format == "chat":
            return self._chat(example)
        if example.messages is not None:
            raise KavaError(
                f"data.format={self.format!r} cannot hold a conversation (data.messages_field); "
                "use data.format=chat"
            )
        return _Parts(
            "".join(example.prompt if piece is None else piece for piece in self._before),
            "".join(example.answer if piece is None else piece for piece in self._after),
            False,
        )

    def _chat(self, example: Example) -> _Parts:
        pairs = example.messages or (("user", example.prompt), ("assistant", example.answer))
        if pairs[-1][0] != "assistant":
            raise KavaError("a conversation does not end with the assistant's reply; drop the rest")
        messages = [{"role": role, "content": content} for role, content in pairs]
        render = self.tokenizer.apply_chat_template
        try:
            prompt = str(render(messages[:-1], tokenize=False, add_generation_prompt=True))
            whole = str(render(messages, tokenize=False))
        except Exception as error:  # templates raise what they like (jinja2, their own refusals)
            raise KavaError(
                f"the tokenizer's chat template refuses a conversation with roles "
                f"{', '.join(role for role, _ in pairs)} ({' '.join(str(error).split())}); "
                "reorder or rename the roles"
            ) from error
        if (thought := _after_opened_thoughts(prompt, whole, pairs[-1][1])) is not None:
            return _Parts(prompt, thought, True)
        if not whole.startswith(prompt):
            raise KavaError(
                "the tokenizer's chat template writes a conversation that does not begin with its "
                "own generation prompt, so the reply cannot be told apart; use data.format=template"
            )
        # What follows the end token (a newline, usually) is never generated, so not trained on.
        return _Parts(prompt, whole[len(prompt) :].rstrip(), True)


def _after_opened_thoughts(prompt: str, whole: str, reply: str) -> str | None:
    """The reply after a generation prompt that ends in an opened thinking block.

    The templates of thinking models open ``<think>`` for generation and write a finished reply
    without its thoughts. Here the reply's own thoughts stand in the block; a reply without any
    closes it at once, which is how these models write thoughts that they skip. None where the
    template has no such block, or writes it both times.
    """
    opened = re.search(r"<think>\s*\Z", prompt)
    if opened is None or whole.startswith(prompt) or not whole.startswith(prompt[: opened.start()]):
        return None
    shown = whole[opened.start() :].strip()
    if shown.startswith("<think>"):
        return shown.removeprefix("<think>").lstrip()
    thoughts, _, _ = reply.rpartition("</think>")
    thoughts = thoughts.rpartition("<think>")[2].strip()
    return f"{thoughts}\n</think>\n\n{shown}"


def _is_document(example: Example) -> bool:
    return not example.prompt and example.messages is None


def _split_template(template: str) -> tuple[list[str | None], list[str | None]]:
    """Pieces before and from ``{answer}`` on; None stands for the prompt or the answer itself."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise KavaError(
            f"data.template={template!r} has a stray brace ({error}); write {{{{ for a brace"
        ) from error
    names = [
        field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        for _, field, spec, conversion in parsed
        if field is not None
    ]
    unknown = [f"{{{name}}}" for name in names if name not in (*_PROMPT_NAMES, "answer")]
    if unknown:
        raise KavaError(
            f"data.template={template!r} has unknown placeholders {', '.join(unknown)}; "
            "use {prompt} (or {question}) and {answer}"
        )
    if names.count("answer") != 1 or names[-1] != "answer" or len(names) < 2:
        raise KavaError(
            f"data.template={template!r} needs {{prompt}} (or {{question}}) and then one {{answer}}"
        )
    pieces: list[str | None] = []
    for literal, field, _, _ in parsed:
        pieces += [literal] if field is None else [literal, None]
    answer = max(place for place, piece in enumerate(pieces) if piece is None)
    start = max(place for place, piece in enumerate(pieces[:answer]) if piece is None) + 1
    between = "".join(piece or "" for piece in pieces[start:answer])
    spaces = between[len(between.rstrip(" ")) :]
    return [*pieces[:start], between.rstrip(" ")], [spaces, *pieces[answer:]]
