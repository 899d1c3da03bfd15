"""A run's data: training batches by step, and held-out rows that are never trained on."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from kava_jax.data.batches import BatchStream
from kava_jax.data.example import Example
from kava_jax.data.sources import fingerprint
from kava_jax.data.text import Encoded, Encoder
from kava_jax.errors import KavaError
from kava_jax.storage import reachable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of a source without a held-out split, at most this share of the rows is held out.
LARGEST_HELD_OUT_SHARE = 0.1

Load = Callable[..., Sequence[Example]]


class HeldOut(NamedTuple):
    """Rows that are never trained on, encoded and as text."""

    rows: list[Encoded]
    examples: Sequence[Example]

    @classmethod
    def of(cls, examples: Sequence[Example], encoder: Encoder) -> "HeldOut":
        """Encode the examples."""
        return cls(encoder.encode_all(examples), examples)

    @property
    def answered(self) -> list[Example]:
        """The questions with a final answer (``#### 14``) to compare."""
        return [row for row in self.examples if "#### " in row.reply and row.question]

    @property
    def measured(self) -> list[Encoded]:
        """The rows that loss and alignment are means over: those with something to predict."""
        return [row for row in self.rows if row.has_loss]

    @property
    def sentence(self) -> str:
        """One line for people, with what is not measured or not wholly."""
        dropped = len(self.rows) - len(self.measured)
        cut = sum(row.truncated for row in self.measured)
        words = [f"{len(self.measured)} rows"]
        words += [f"{cut} of them truncated"] if cut else []
        words += [f"{dropped} more dropped (prompt fills the row)"] if dropped else []
        return ", ".join(words)


class Dataset(NamedTuple):
    """Training stream, held-out rows, what identifies both, and what to say of them.

    ``more`` are further held-out sets by name; they identify nothing.
    """

    stream: BatchStream
    held_out: HeldOut
    fingerprint: str
    """Of the text of all rows."""
    tokens: str
    """Fingerprint of what the tokenizer made of them, and of the tokenizer's vocabulary."""
    notes: tuple[str, ...]
    more: Mapping[str, HeldOut]


def split_examples(
    load: Load,
    *,
    path: str,
    split: str,
    rows: int | None,
    eval_path: str | None,
    eval_split: str | None,
    eval_rows: int,
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Training and held-out examples, disjoint.

    Held-out rows come from ``eval_path`` or ``eval_split`` when given, from the generator's dev
    split (the half of test that is for choices) when ``path`` is the generator, and else from the
    end of the training rows (always so for a single file without ``eval_path``).

    Raises KavaError when a single row would have to be both.
    """
    if eval_path is None and reachable(path, "data.path").is_file():
        eval_split = None  # a single file has no splits: asking for one would give its first rows
    if eval_path is None and eval_split is None and path.startswith("builtin:"):
        eval_split = "dev"
    if eval_path is not None or eval_split is not None:
        where, what = eval_path or path, eval_split or split
        return load(path, split=split, rows=rows), load(where, split=what, rows=eval_rows)
    # All rows are read whatever data.rows is. The held-out rows come from the end of all of them,
    # so a run with more rows never trains on what a run with fewer held out.
    examples = load(path, split=split, rows=None)
    if len(examples) < 2:
        raise KavaError(
            f"data.path={path!r} has {len(examples)} row, too few to hold one out; "
            "give data.eval_path"
        )
    held = max(1, min(eval_rows, int(len(examples) * LARGEST_HELD_OUT_SHARE)))
    return examples[: len(examples) - held][:rows], examples[len(examples) - held :]


def make_dataset(
    training: Sequence[Example],
    held_out: Sequence[Example],
    encoder: Encoder,
    make_stream: Callable[[Sequence[Encoded]], BatchStream],
    *,
    more: Mapping[str, Sequence[Example]] = MappingProxyType({}),
) -> Dataset:
    """Encode everything once. The notes say what was cut, dropped, held out and repeated.

    ``make_stream`` is ``BatchStream`` with everything bound but the rows.

    Raises KavaError for a set of which no row has a target.
    """
    encoded, held = encoder.encode_all(training), HeldOut.of(held_out, encoder)
    stream = make_stream(encoded)
    others = {name: HeldOut.of(examples, encoder) for name, examples in more.items()}
    for name, measured in {"held-out": held, **others}.items():
        if not measured.measured:
            raise KavaError(
                f"data.max_length={encoder.max_length} leaves no {name} row with an answer to "
                f"measure ({len(measured.rows)} rows, all filled by their prompts); raise it, or "
                f"give other rows"
            )
    notes = [f"data: {stream.sentence}", f"held out: {held.sentence}"]
    notes += [f"set {name}: {other.sentence}" for name, other in others.items()]
    notes += _overlaps(training, {"held-out": held_out, **more})
    identity = fingerprint([*training, *held_out])
    tokens = token_fingerprint(encoder.tokenizer, [encoded, held.rows])
    return Dataset(stream, held, identity, tokens, tuple(notes), others)


def token_fingerprint(
    tokenizer: "PreTrainedTokenizerBase", parts: Iterable[Sequence[Encoded]]
) -> str:
    """SHA-256 (hex) of encoded rows, part by part, and of all that the tokenizer gives an id to.

    Taken from what the tokenizer does, because other versions write the same tokenizer differently.
    """
    special = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    known = (sorted(tokenizer.get_vocab().items()), special, tokenizer.chat_template)
    digest = hashlib.sha256(json.dumps(known).encode())
    for rows in parts:
        digest.update(f"{len(rows)} rows\n".encode())
        for row in rows:
            # The lengths separate the rows. The ids alone could be cut into other rows with the
            # same bytes.
            digest.update(f"{row.prompt_length} of {len(row.ids)}\n".encode())
            # Little-endian, so that every machine gets the same fingerprint.
            digest.update(row.ids.astype("<i4").tobytes())
            digest.update(b"" if row.trained is None else row.trained.tobytes())
    return digest.hexdigest()


def _overlaps(training: Sequence[Example], sets: Mapping[str, Sequence[Example]]) -> list[str]:
    """What to say of rows that occur twice in the training data, or in a held-out set as well."""
    notes = []
    repeats = len(training) - len({_text_of(row) for row in training})
    if repeats:
        notes.append(f"data: {repeats} training rows are the same as an earlier one")
    shown = {_asked(row) for row in training}
    for name, examples in sets.items():
        known = sum(_asked(row) in shown for row in examples)
        if known:
            notes.append(
                f"{name}: {known} of {len(examples)} rows ask what a training row asks, so figures "
                f"on them flatter; take them out of one of the two"
            )
        repeats = len(examples) - len({_text_of(row) for row in examples})
        if repeats:
            notes.append(f"{name}: {repeats} rows are the same as an earlier one")
    return notes


def _text_of(row: Example) -> str:
    # Messages from tables may hold dates and other values that JSON does not know.
    return json.dumps(row, default=str)


def _asked(row: Example) -> str:
    """The row without its answer; a document whole."""
    if row.messages is not None:
        return _text_of(Example("", "", row.messages[:-1], row.tools))
    return row.prompt or row.answer
