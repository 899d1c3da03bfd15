"""Text to ids: where the prompt ends, what is trained on, and what did not fit.

A row is ``prompt + answer + end``; cross-entropy sees the answer and its end token only. Formats:

    qa        ``Question: {prompt}\\nAnswer: {answer}`` and the eos token
    template  the user's own text around ``{prompt}`` and ``{answer}``, and the eos token
    chat      the tokenizer's chat template; trained on is the last reply with its end token and
              its thoughts, or (``train_on="assistant"``) every reply

A document (an example without prompt) is trained on whole, with eos after it, whatever the format.
The prompt's ids never depend on the answer: generation starts from exactly the ids that were
trained on. Left out on purpose: few-shot prompts, packing, and batches (see ``batches``).
"""

import itertools
import math
import string
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from kava_jax.data.chat import ChatTemplate, TrainOn
from kava_jax.data.example import Example
from kava_jax.errors import KavaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QA_TEMPLATE = "Question: {prompt}\nAnswer: {answer}"
Format = Literal["qa", "template", "chat"]

_PROMPT_NAMES = ("prompt", "question")


class Encoded(NamedTuple):
    """One row of ids. The first ``prompt_length`` ids are read but not trained on.

    Of the ids behind them those that are trained on are True in ``trained``; None is all of them.
    """

    ids: Int32[np.ndarray, "T"]
    prompt_length: int
    truncated: bool
    trained: Bool[np.ndarray, "T"] | None = None

    @property
    def targets(self) -> Bool[np.ndarray, "T"]:
        """The ids that are targets; a row's first id never is, as nothing comes before it."""
        behind = np.arange(len(self.ids)) >= max(self.prompt_length, 1)
        return behind if self.trained is None else behind & self.trained

    @property
    def has_loss(self) -> bool:
        """Whether any id is a target."""
        return bool(self.targets.any())


class _Parts(NamedTuple):
    """A row as text: pieces that are read and trained on by turns, the last one trained on.

    The last piece holds the end token only if ``ended``.
    """

    pieces: list[str]
    ended: bool


class Encoder:
    """Turns examples into ids, in one of the formats of this module.

    Args:
        tokenizer: a fast or slow ``transformers`` tokenizer with an eos token.
        format: ``qa``, ``template`` or ``chat``.
        template: for ``template`` only; text with ``{prompt}`` (or ``{question}``) before one
            ``{answer}``. Spaces right before ``{answer}`` are read with the answer, as BPE does.
        max_length: longest row in ids.
        train_on: of a conversation (format ``chat``), the last reply or every one.
        today: the date for chat templates that write one; today's when absent.

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
        train_on: TrainOn = "last",
        today: date | None = None,
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
        self.today = today or date.today()
        self.chat = ChatTemplate(tokenizer, train_on, self.today) if format == "chat" else None
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
        part = self._parts(example)
        return np.array(self._start(part) + self._ids(["".join(part.pieces[:-1])])[0], np.int32)

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
        # The text up to the end of every piece, of all rows at once.
        upto = [text for part in parts for text in itertools.accumulate(part.pieces)]
        ids = iter(self._ids(upto))
        return [
            self._row(example, part, [next(ids) for _ in part.pieces], cut_documents)
            for example, part in zip(examples, parts, strict=True)
        ]

    def _row(
        self, example: Example, part: _Parts, upto: list[list[int]], cut_documents: bool
    ) -> Encoded:
        """One row, given the ids of its text up to the end of every piece."""
        start = self._start(part)
        whole, ends = [], []
        for piece, longer in zip(part.pieces, upto, strict=True):
            # Where the boundary falls inside a merge, the piece is tokenized on its own.
            fits = longer[: len(whole)] == whole
            whole = longer if fits else whole + self._ids([piece])[0]
            ends.append(len(start) + len(whole))
        whole = start + whole
        if not (part.ended and whole[-1] in self._special):
            whole = [*whole, self.tokenizer.eos_token_id]
        document = _is_document(example)
        ids = np.array(whole[: None if document and not cut_documents else self.max_length])
        prompt_length = 0 if document else min(ends[0], len(ids))
        trained = None
        if len(ends) > 2:
            # Which piece an id is in; those with odd numbers are trained on.
            piece_T = np.searchsorted(ends[:-1], np.arange(len(ids)), side="right")
            trained = piece_T % 2 == 1
        return Encoded(ids.astype(np.int32), prompt_length, len(ids) < len(whole), trained)

    def _windows(self, row: Encoded) -> list[Encoded]:
        if len(row.ids) <= self.max_length:
            return [row]
        pieces = np.array_split(row.ids, math.ceil(len(row.ids) / self.max_length))
        return [Encoded(piece, 0, False) for piece in pieces]

    def _start(self, part: _Parts) -> list[int]:
        return [] if part.ended else self._bos  # a chat template writes its own BOS

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _parts(self, example: Example) -> _Parts:
        if _is_document(example):
            return _Parts(["", example.answer], False)
        if self.chat is not None:
            return _Parts(self.chat.pieces(example), True)
        if example.messages is not None:
            raise KavaError(
                f"data.format={self.format!r} cannot hold a conversation (data.messages_field); "
                "use data.format=chat"
            )
        prompt = "".join(example.prompt if piece is None else piece for piece in self._before)
        answer = "".join(example.answer if piece is None else piece for piece in self._after)
        return _Parts([prompt, answer], False)


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
