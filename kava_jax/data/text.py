"""Text to ids: where the prompt ends, what is trained on, and what did not fit.

A row is ``prompt + answer + end``; cross-entropy sees the answer and its end token only. Formats:

    qa          ``Question: {prompt}\\nAnswer: {answer}`` and the eos token
    chat        the tokenizer's chat template; trained on is the last reply with its end token and
                its thoughts, or (``train_on="assistant"``) every reply
    a template  the user's own text around ``{prompt}`` and ``{answer}``, and the eos token

A document (an example without prompt) is trained on whole, with eos after it, whatever the format.
The prompt's ids never depend on the answer: generation starts from exactly the ids that were
trained on. Left out on purpose: few-shot prompts, packing, and batches (see ``batches``).
"""

import itertools
import math
import string
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import date
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from kava_jax.data.chat import TrainOn, chat_pieces
from kava_jax.data.example import Example
from kava_jax.errors import KavaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QA_TEMPLATE = "Question: {prompt}\nAnswer: {answer}"
_PROMPT_NAMES = ("prompt", "question")
# Takes the place of the answer while a template is filled in, and is in no text.
_MARK = "\0answer\0"


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


@dataclass(eq=False)
class Encoder:
    """Turns examples into ids, in one of the formats of this module.

    Args:
        tokenizer: a fast or slow ``transformers`` tokenizer with an eos token.
        format: ``qa``, ``chat``, or a template: a text with ``{prompt}`` (or ``{question}``) before
            one ``{answer}``, and ``{{`` for a brace. Spaces right before ``{answer}`` are read with
            the answer, as BPE does.
        max_length: longest row in ids.
        train_on: of a conversation (format ``chat``), the last reply or every one.
        today: the date for chat templates that write one.

    Raises:
        KavaError: the format is neither of the two names nor a template, the tokenizer has no eos
            token or no chat template, or ``max_length`` is below 2.
    """

    tokenizer: "PreTrainedTokenizerBase"
    _: KW_ONLY
    format: str = "qa"
    max_length: int = 512
    train_on: TrainOn = "last"
    today: date = field(default_factory=date.today)

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise KavaError(
                f"data.max_length={self.max_length} leaves nothing to predict; use 2 or more"
            )
        if self.tokenizer.eos_token_id is None:
            raise KavaError("the tokenizer has no eos token, so no answer could end; set eos_token")
        if self.format == "chat" and not self.tokenizer.chat_template:
            raise KavaError(
                "data.format='chat' needs a tokenizer with a chat template and this one has none; "
                "use data.format=qa or an instruct model's tokenizer"
            )
        self._special = frozenset(self.tokenizer.all_special_ids)
        if self.format != "chat":
            self._template = QA_TEMPLATE if self.format == "qa" else self.format
            self._spaces = _spaces_before_answer(self._template)
        # Special tokens are placed by hand: what a tokenizer adds by itself differs by family.
        added = self.tokenizer("")["input_ids"]
        self._bos = [b for b in added[:1] if b == self.tokenizer.bos_token_id]

    def encode(self, example: Example) -> Encoded:
        """One row (a document too), cut at ``max_length``; ``truncated`` then says so."""
        return self._cut(self._whole([example])[0])

    def encode_prompt(self, example: Example) -> Int32[np.ndarray, "T"]:
        """The ids before the answer, for generation; never cut.

        Raises:
            KavaError: the example is a document, which has no prompt.
        """
        if _is_document(example):
            raise KavaError(
                "a plain document has no prompt to answer; use a question/answer source"
            )
        prompt = "".join(self._pieces(example)[:-1])
        return np.array(self._start(example) + self._ids([prompt])[0], np.int32)

    def encode_all(self, examples: Sequence[Example]) -> list[Encoded]:
        """All rows. A document longer than ``max_length`` becomes several rows of even length.

        Rows whose prompt alone fills ``max_length`` are kept here with ``has_loss`` False; the
        batches drop and count them.
        """
        rows = []
        for example, row in zip(examples, self._whole(examples), strict=True):
            rows += self._windows(row) if _is_document(example) else [self._cut(row)]
        return rows

    def _whole(self, examples: Sequence[Example]) -> list[Encoded]:
        """A row of each example, of any length."""
        pieces = [self._pieces(example) for example in examples]
        # The text up to the end of every piece, of all rows at once.
        # A merge may cross the boundary of two pieces, so pieces tokenized alone give other ids
        # than the whole text. The text up to each boundary shows where the pieces end in ids.
        upto = [text for row in pieces for text in itertools.accumulate(row)]
        ids = iter(self._ids(upto))
        return [
            self._row(example, row, [next(ids) for _ in row])
            for example, row in zip(examples, pieces, strict=True)
        ]

    def _row(self, example: Example, pieces: list[str], upto: list[list[int]]) -> Encoded:
        """One row, given the ids of its text up to the end of every piece."""
        start = self._start(example)
        whole, ends = [], []
        for piece, longer in zip(pieces, upto, strict=True):
            # Where the boundary falls inside a merge, the piece is tokenized on its own.
            fits = longer[: len(whole)] == whole
            whole = longer if fits else whole + self._ids([piece])[0]
            ends.append(len(start) + len(whole))
        whole = start + whole
        # A chat template may write the end token itself.
        if not (self._by_chat_template(example) and whole[-1] in self._special):
            whole = [*whole, self.tokenizer.eos_token_id]
        trained = None
        if len(ends) > 2:
            # Which piece an id is in; those with odd numbers are trained on.
            piece_T = np.searchsorted(ends[:-1], np.arange(len(whole)), side="right")
            trained = piece_T % 2 == 1
        prompt_length = 0 if _is_document(example) else ends[0]
        return Encoded(np.array(whole, np.int32), prompt_length, False, trained)

    def _cut(self, row: Encoded) -> Encoded:
        if len(row.ids) <= self.max_length:
            return row
        trained = None if row.trained is None else row.trained[: self.max_length]
        prompt_length = min(row.prompt_length, self.max_length)
        return Encoded(row.ids[: self.max_length], prompt_length, True, trained)

    def _windows(self, row: Encoded) -> list[Encoded]:
        # Even windows: full ones would leave a last one of a few ids, which have little before them
        # to be predicted from.
        pieces = np.array_split(row.ids, math.ceil(len(row.ids) / self.max_length))
        return [Encoded(piece, 0, False) for piece in pieces]

    def _start(self, example: Example) -> list[int]:
        return [] if self._by_chat_template(example) else self._bos  # it writes its own BOS

    def _by_chat_template(self, example: Example) -> bool:
        return self.format == "chat" and not _is_document(example)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: transformers would warn of texts beyond the model's length, and rows are
        # cut later.
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _pieces(self, example: Example) -> list[str]:
        """The row as text, in pieces: read, trained on, and so forth; the last is trained on."""
        if _is_document(example):
            return ["", example.answer]
        if self.format == "chat":
            return chat_pieces(self.tokenizer, example, train_on=self.train_on, today=self.today)
        if example.messages is not None:
            raise KavaError(
                f"data.format={self.format!r} cannot hold a conversation (data.messages_field); "
                "use data.format=chat"
            )
        filled = self._template.format(prompt=example.prompt, question=example.prompt, answer=_MARK)
        before, _, after = filled.rpartition(_MARK)
        # BPE joins a space with the word after it. A prompt that kept the space would end in an id
        # that is not in the ids of the whole row.
        boundary = len(before) - self._spaces
        return [before[:boundary], before[boundary:] + example.answer + after]


def _is_document(example: Example) -> bool:
    return not example.prompt and example.messages is None


def _spaces_before_answer(template: str) -> int:
    """How many spaces a template has right before ``{answer}``.

    Raises KavaError for a text that is no template.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise KavaError(
            f"data.format={template!r} has a stray brace ({error}); write {{{{ for a brace"
        ) from error
    names = [
        name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        for _, name, spec, conversion in parsed
        if name is not None
    ]
    unknown = [f"{{{name}}}" for name in names if name not in (*_PROMPT_NAMES, "answer")]
    problem = ""
    if not names:
        problem = "is unknown"
    elif unknown:
        problem = f"has unknown placeholders {', '.join(unknown)}"
    elif names.count("answer") != 1 or names[-1] != "answer" or len(names) < 2:
        problem = "needs {prompt} (or {question}) and then one {answer}"
    if problem:
        raise KavaError(
            f"data.format={template!r} {problem}; use qa, chat, or a text with {{prompt}} and "
            "{answer}"
        )
    between = next(literal for literal, name, _, _ in parsed if name == "answer")
    return len(between) - len(between.rstrip(" "))
