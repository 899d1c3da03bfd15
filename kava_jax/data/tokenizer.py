"""Tokenizers: the built-in one, a local Hugging Face directory, or a hub id.

The built-in tokenizer is that of the shipped teacher: byte-level BPE of 512 ids, trained on
generated problems (``docs/results/builtin_tokenizer.py``). Every digit is a token of its own, and
all 256 bytes are in it, so any text comes back unchanged.

Left out on purpose: remote code (``trust_remote_code`` is never set) and any change to a loaded
tokenizer. If it has no pad token, :func:`pad_id` gives its eos. That is safe, because masks and not
ids say what is padding.
"""

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kava_jax.errors import KavaError, one_line
from kava_jax.storage import at_revision, looks_local, reachable, written_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from kava_jax.data.text import Encoded

BUILTIN_TOKENIZER = "builtin:tokenizer"

_DISAGREEMENT = "{} and the run's tokenizer disagree: {}; use models with one tokenizer"
# Any of these files tells which id is which token.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def load_tokenizer(path_or_id: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer at this address, through ``transformers``.

    Args:
        path_or_id: ``builtin:tokenizer``, a local directory with ``tokenizer.json``, or a hub
            id; ``id@revision`` pins a branch, tag or commit of it.

    Raises:
        KavaError: the directory does not exist or holds no tokenizer, or the hub does not have it
            or does not grant access.
    """
    name = written_out(str(path_or_id))
    if name == BUILTIN_TOKENIZER:
        return builtin_tokenizer()
    path = reachable(name, "tokenizer")
    local = looks_local(name) or path.exists()
    known = (*_VOCABULARIES, "tokenizer_config.json")
    if local and not (name.strip() and any((path / file).is_file() for file in known)):
        raise KavaError(
            f"tokenizer={name!r} does not exist or holds no tokenizer; give a local directory with "
            f"tokenizer.json, a hub id or {BUILTIN_TOKENIZER}"
        )
    from transformers import AutoTokenizer

    try:
        hub_id, revision = (name, None) if local else at_revision(name)
        tokenizer = AutoTokenizer.from_pretrained(
            hub_id, revision=revision, trust_remote_code=False
        )
    except Exception as error:  # transformers raises a dozen types, all of them about the input
        reason = one_line(error).split(". ")[0]
        raise KavaError(
            f"tokenizer={name!r} cannot be loaded ({type(error).__name__}: {reason}); give a "
            f"local directory with tokenizer.json, a hub id you may read, or {BUILTIN_TOKENIZER}"
        ) from error
    if len(tokenizer) == 0:
        raise KavaError(f"tokenizer={name!r} has no tokens; the directory needs tokenizer.json")
    return tokenizer


def builtin_tokenizer() -> "PreTrainedTokenizerFast":
    """The built-in tokenizer: 512 ids, eos ``<|endoftext|>``, pad ``<|pad|>``, no BOS."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(files("kava_jax") / "assets/demo_teacher"))


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that fills rows: the pad token's, else the eos token's, else 0."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """One more than the largest id: the rows a model needs. Ids may have gaps, so no count."""
    return max(tokenizer.get_vocab().values()) + 1


def check_same_ids(
    tokenizer: "PreTrainedTokenizerBase", directory: Path, who: str
) -> tuple[dict[int, str], str | None]:
    """Refuse a model whose own tokenizer gives the same id to another token, or the reverse.

    Vocabularies are compared, not names; one may hold tokens that the other lacks. A directory
    without a tokenizer is taken on trust.

    Args:
        tokenizer: the run's.
        directory: the model's.
        who: what to call the model in messages, such as ``teachers.big``.

    Returns:
        The special tokens that only have another name there, by id, in words; they do no harm as
        long as no row uses them (:func:`check_unused`). And what to say of the comparison, if
        anything.

    Raises:
        KavaError: the two disagree, or the model's tokenizer cannot be read; names the model and
            the first difference.
    """
    if not any((directory / file).is_file() for file in _VOCABULARIES):
        return {}, f"{who} has no tokenizer of its own; its ids are taken to be the run's"
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
    renamed, untrained = {}, []
    for token, index in sorted(ours.items(), key=lambda item: item[1]):
        found = by_id.get(index)
        if found == token or (token not in theirs and found is None):
            untrained += [] if found else [index]
            continue
        names = f"id {index} is {token!r} in the run and {found or 'another token'!r} there"
        # Ordinary tokens can occur in any text, also in a generated one, so they must agree.
        # Special ones may differ as long as no row uses them.
        if index not in special or not (found is None or index in other.added_tokens_decoder):
            raise KavaError(_DISAGREEMENT.format(who, names))
        renamed[index] = names
    if not untrained:
        return renamed, None
    return renamed, (
        f"{who} does not know {len(untrained)} of the tokenizer's tokens, from id {untrained[0]} "
        f"({tokenizer.convert_ids_to_tokens(untrained[0])!r}) on: its rows for them are untrained"
    )


def check_unused(renamed: Mapping[int, str], rows: Iterable["Encoded"], who: str) -> str | None:
    """What to say of special tokens that have other names in a model; refuse those in use.

    Raises:
        KavaError: a row holds one of them; names the model and the token.
    """
    if not renamed:
        return None
    used = set[int]().union(*(np.unique(row.ids).tolist() for row in rows))
    for index, names in renamed.items():
        if index in used:
            raise KavaError(_DISAGREEMENT.format(who, names))
    first = next(iter(renamed.values()))
    return f"{who} has other names for {len(renamed)} special tokens ({first}); no row uses them"
