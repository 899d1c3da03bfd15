"""Tokenizers: the built-in one, a local Hugging Face directory, or a hub id.

The built-in tokenizer is made by code, not shipped as a file: byte-level BPE trained on generated
problems of the training split (and a few lines of plain English), every digit a token of its own,
512 ids. All 256 bytes are in it, so any text comes back unchanged.

Left out on purpose: remote code (``trust_remote_code`` is never set) and any change to a loaded
tokenizer. One without a pad token stays so; :func:`pad_id` then answers with its eos, which is
safe because padding is told apart by masks and never by id.
"""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kava_jax.data.problems import word_problems
from kava_jax.errors import KavaError
from kava_jax.storage import reachable, written_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from kava_jax.data.text import Encoded

BUILTIN_TOKENIZER = "builtin:tokenizer"
EOS, PAD = "<|endoftext|>", "<|pad|>"

# Any of these files tells which id is which token.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_VOCABULARY = 512
_PROBLEMS = 2000
# The problems alone run out of merges near 440 ids; common English words fill the rest.
_ENGLISH = (
    "The people and the children in that house were there with all of their things from the time "
    "before, but they would not have been able to make them into what she wanted for her other "
    "friends. When he said this, they could see how good it is to be one of those who know about "
    "some of the little animals which live here. You can think of your own words because you may "
    "like to work, play, look, come and go out again after another day, down where no one is."
)


def load_tokenizer(
    path_or_id: str | Path, revision: str | None = None
) -> "PreTrainedTokenizerBase":
    """The tokenizer at this address, through ``transformers``.

    Args:
        path_or_id: ``builtin:tokenizer``, a local directory with ``tokenizer.json``, or a hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        KavaError: the directory does not exist or holds no tokenizer, or the hub does not have it
            or does not grant access.
    """
    name = written_out(str(path_or_id))
    if name == BUILTIN_TOKENIZER:
        return builtin_tokenizer()
    _check_directory(name)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen types, all of them about the input
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        at = f" at revision {revision!r}" if revision else ""
        raise KavaError(
            f"tokenizer={name!r}{at} cannot be loaded ({type(error).__name__}: {reason}); give a "
            f"local directory with tokenizer.json, a hub id you may read, or {BUILTIN_TOKENIZER}"
        ) from error
    if len(tokenizer) == 0:
        raise KavaError(f"tokenizer={name!r} has no tokens; the directory needs tokenizer.json")
    return tokenizer


def _check_directory(name: str) -> None:
    path = reachable(name, "tokenizer")
    if not name.strip():
        raise KavaError(
            f"tokenizer={name!r} is empty; give a directory, a hub id or {BUILTIN_TOKENIZER}"
        )
    if path.is_file():
        raise KavaError(f"tokenizer={name!r} is a file; give the directory that holds it")
    if path.is_dir():
        known = (*_VOCABULARIES, "tokenizer_config.json")
        if not any((path / file).is_file() for file in known):
            raise KavaError(
                f"tokenizer={name!r} holds no tokenizer; it needs tokenizer.json "
                "(copy it from the model's repository)"
            )
    elif name.startswith(("builtin:", "/", ".", "~")) or name.count("/") > 1:
        raise KavaError(
            f"tokenizer={name!r} does not exist; give a local directory, a hub id or "
            f"{BUILTIN_TOKENIZER}"
        )


@functools.cache
def _builtin_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[EOS, PAD],
        show_progress=False,
    )
    problems = word_problems("train", seed=0, rows=_PROBLEMS)
    texts = [f"Question: {example.prompt}\nAnswer: {example.answer}" for example in problems]
    tokenizer.train_from_iterator([*texts, _ENGLISH], trainer)
    return tokenizer.to_str()


def builtin_tokenizer() -> "PreTrainedTokenizerFast":
    """The built-in tokenizer: 512 ids, eos ``<|endoftext|>``, pad ``<|pad|>``, no BOS."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_builtin_json()),
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that fills rows: the pad token's, else the eos token's, else 0."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """One more than the largest id: the rows a model needs. Ids may have gaps, so no count."""
    return max(tokenizer.get_vocab().values()) + 1


class Renamed(NamedTuple):
    """A special token that two tokenizers call by different names."""

    id: int
    ours: str
    theirs: str | None


def check_same_ids(
    tokenizer: "PreTrainedTokenizerBase", directory: Path, who: str
) -> tuple[list[Renamed], str | None]:
    """Refuse a model whose own tokenizer gives the same id to another token, or the reverse.

    Vocabularies are compared, not names; one may hold tokens that the other lacks. A directory
    without a tokenizer is taken on trust.

    Args:
        tokenizer: the run's.
        directory: the model's.
        who: what to call the model in messages, such as ``teachers.big``.

    Returns:
        Special tokens that merely have other names there, which is no matter as long as no row
        uses them (:func:`check_unused`), and what to say of the comparison, if anything.

    Raises:
        KavaError: the two disagree, or the model's tokenizer cannot be read; names the model and
            the first difference.
    """
    if not any((directory / file).is_file() for file in _VOCABULARIES):
        return [], f"{who} has no tokenizer of its own; its ids are taken to be the run's"
    try:
        other = load_tokenizer(directory)
    except KavaError as error:
        raise KavaError(
            f"{who}: its ids cannot be compared with the run's, as its {error}; or, if they are "
            "known to be the same, move its tokenizer files away"
        ) from error
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    by_id = {index: token for token, index in theirs.items()}
    special = tokenizer.added_tokens_decoder.keys()
    renamed, untrained = [], []
    for token, index in sorted(ours.items(), key=lambda item: item[1]):
        found = by_id.get(index)
        if found == token or (token not in theirs and found is None):
            untrained += [] if found else [index]
        elif index in special and (found is None or index in other.added_tokens_decoder):
            renamed.append(Renamed(index, token, found))
        else:
            raise KavaError(_disagreement(who, Renamed(index, token, found or "another token")))
    if not untrained:
        return renamed, None
    return renamed, (
        f"{who} does not know {len(untrained)} of the tokenizer's tokens, from id {untrained[0]} "
        f"({tokenizer.convert_ids_to_tokens(untrained[0])!r}) on: its rows for them are untrained"
    )


def check_unused(renamed: Sequence[Renamed], rows: Iterable["Encoded"], who: str) -> str | None:
    """What to say of special tokens that have other names in a model; refuse those in use.

    Raises:
        KavaError: one of them stands in a row; names the model and the token.
    """
    if not renamed:
        return None
    used = set[int]().union(*(np.unique(row.ids).tolist() for row in rows))
    for token in renamed:
        if token.id in used:
            raise KavaError(_disagreement(who, token))
    first = renamed[0]
    return (
        f"{who} has other names for {len(renamed)} special tokens (id {first.id} is {first.ours!r} "
        f"in the run and {first.theirs!r} there); no row uses them"
    )


def _disagreement(who: str, token: Renamed) -> str:
    return (
        f"{who} and the run's tokenizer disagree: id {token.id} is {token.ours!r} for the run and "
        f"{token.theirs!r} for the model; use models with one tokenizer"
    )
