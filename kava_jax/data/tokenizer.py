"""Tokenizers: the built-in one, a local Hugging Face directory, or a hub id.

The built-in tokenizer is made by code, not shipped as a file: byte-level BPE trained on generated
problems of the training split (and a few lines of plain English), every digit a token of its own,
512 ids. All 256 bytes are in it, so any text comes back unchanged.

Left out on purpose: remote code (``trust_remote_code`` is never set) and any change to a loaded
tokenizer. One without a pad token stays so; :func:`pad_id` then answers with its eos, which is
safe because padding is told apart by masks and never by id.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from kava_jax.data.problems import WordProblems
from kava_jax.errors import KavaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BUILTIN_TOKENIZER = "builtin:tokenizer"
EOS, PAD = "<|endoftext|>", "<|pad|>"

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
    name = str(path_or_id)
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
    path = Path(name).expanduser()
    if not name.strip():
        raise KavaError(
            f"tokenizer={name!r} is empty; give a directory, a hub id or {BUILTIN_TOKENIZER}"
        )
    if path.is_file():
        raise KavaError(f"tokenizer={name!r} is a file; give the directory that holds it")
    if path.is_dir():
        known = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
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
    problems = WordProblems("train", seed=0, rows=_PROBLEMS)
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


def check_same_ids(
    tokenizer: "PreTrainedTokenizerBase", teacher_directory: Path, teacher: str
) -> None:
    """Refuse a teacher whose own tokenizer gives the same id to another token, or the reverse.

    Vocabularies are compared, not names; one may hold tokens that the other lacks. A directory
    without a tokenizer is taken on trust.

    Raises:
        KavaError: the two disagree; names the teacher and the first difference.
    """
    if not (teacher_directory / "tokenizer.json").is_file():
        return
    ours = tokenizer.get_vocab()
    theirs = load_tokenizer(teacher_directory).get_vocab()
    by_id = {index: token for token, index in theirs.items()}
    for token, index in sorted(ours.items(), key=lambda item: item[1]):
        other = by_id.get(index, token)
        if other != token or theirs.get(token, index) != index:
            raise KavaError(
                f"teachers.{teacher} and the student's tokenizer disagree: id {index} is {token!r} "
                f"for the student and {other!r} for the teacher; use models with one tokenizer"
            )
