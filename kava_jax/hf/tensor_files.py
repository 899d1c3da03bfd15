"""The safetensors files of a model directory: what is in which file, and reading it by slice.

Files in public repositories differ in a few ways, which are settled here so that everything else
sees the names of ``hf.names``. A base model's tensors lack ``model.``; shards may lie in subfolders
or hold a tensor that the index places in another shard; a tied head may be stored as well as the
embedding, or instead of it. Other names are never guessed.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from kava_jax.errors import KavaError
from kava_jax.hf.locate import weight_files, weight_index
from kava_jax.hf.names import Index

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What transformers' base classes (``LlamaModel``) save without their prefix.
_BASE = re.compile(r"(embed_tokens|layers|norm)\.")
# A text model inside one that reads images, as transformers 4.x and 5.x call it; and the rest.
_TEXT = re.compile(r"(?:language_model\.(?=model\.|lm_head\.)|model\.language_model\.)")
_IMAGES = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.")
# A copy of a tied head is compared in pieces of about this many numbers.
_PIECE = 1 << 24
# Numbers in a piece that is checked for NaN and infinity; in float32 it takes 1 MiB.
_CACHED = 1 << 18


class Tensor(NamedTuple):
    """What a file's header says of one tensor."""

    file: Path
    stored_as: str
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """The safetensors files of a directory, read by slice.

    A file is open only while a slice of it is read: what is mapped counts as this process's memory,
    and a teacher's files together are as large as the teacher.
    """

    def __init__(self, directory: Path):
        """Read every file's header, and no tensor data.

        Raises:
            KavaError: a file is missing or damaged, or two hold the same tensor and no index says
                which counts.
        """
        self.tensors: dict[str, Tensor] = {}
        self.directory = directory
        self.not_finite: set[str] = set()
        """Tensors in which ``read_weight`` has met NaN or infinity."""
        index = weight_index(directory)
        for file in weight_files(directory):
            with self._opened(directory / file) as opened:
                for key in opened.keys():  # noqa: SIM118  (no mapping)
                    if index.get(key, file) == file:
                        found = opened.get_slice(key)
                        shape = tuple(found.get_shape())
                        self._add(Tensor(directory / file, key, shape, found.get_dtype()))

    def _add(self, tensor: Tensor) -> None:
        name = tensor.stored_as
        if _IMAGES.match(name):
            return
        if found := _TEXT.match(name):
            name = name[found.end() :]
        name = f"model.{name}" if _BASE.match(name) else name
        first = self.tensors.setdefault(name, tensor)
        if first is not tensor:
            raise KavaError(
                f"{self.directory.name}: {name} is stored twice, as {first.stored_as} in "
                f"{first.file.name} and as {tensor.stored_as} in {tensor.file.name}; remove one or "
                "name its file in model.safetensors.index.json"
            )

    def read(self, name: str, index: Index) -> np.ndarray:
        """One part of one tensor."""
        tensor = self.tensors[name]
        with self._opened(tensor.file) as file:
            return file.get_slice(tensor.stored_as)[index]

    def read_weight(self, name: str, index: Index) -> np.ndarray:
        """One part of one tensor of floats, looked through for NaN and infinity."""
        part = self.read(name, index)
        if not _all_finite(part):
            self.not_finite.add(name)
        return part

    def settle_tied_head(self) -> None:
        """Of a tied model: take a head that is stored alone as the embedding, drop a second copy.

        Raises:
            KavaError: embedding and head are both stored and differ, so they are not tied.
        """
        if (head := self.tensors.get(HEAD)) is None:
            return
        embedding = self.tensors.setdefault(EMBEDDING, head)
        # A head of another shape is left for the check of all tensors to name.
        if embedding.shape == head.shape and len(head.shape) == 2:
            if embedding is not head and self._differ(head.shape):
                raise KavaError(
                    f"{self.directory.name}: config.json ties the head to the embedding, but "
                    f"{HEAD} and {EMBEDDING} hold different values; set tie_word_embeddings to "
                    f"false to use both, or remove {HEAD}"
                )
            del self.tensors[HEAD]

    def _differ(self, shape: tuple[int, ...]) -> bool:
        rows = max(1, _PIECE // shape[-1])
        starts = range(0, shape[0], rows)
        pieces = [(slice(start, min(start + rows, shape[0])),) for start in starts]
        # The two may be stored in different dtypes, and float32 holds every float16 and bfloat16
        # exactly. NaNs count as equal here, because the embedding's are reported when it is read.
        both = ([self.read(n, p).astype(np.float32) for n in (EMBEDDING, HEAD)] for p in pieces)
        return not all(np.array_equal(*pair, equal_nan=True) for pair in both)

    @contextmanager
    def _opened(self, path: Path) -> Iterator[Any]:
        try:
            with safe_open(path, framework="np") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise KavaError(
                f"{self.directory.name}/{path.name} is truncated or damaged ({error}); "
                "download or copy it again"
            ) from error


def _all_finite(array: np.ndarray) -> bool:
    """Whether no float is NaN or infinite.

    For formats with two bytes numpy converts every number first, which is slow. There the bits
    without the sign are compared as integers: finite numbers come before infinity, NaN after it.
    """
    flat = array.reshape(-1)
    # In pieces that stay in the processor's cache, with what is made of them on the way.
    pieces = (flat[start : start + _CACHED] for start in range(0, flat.size, _CACHED))
    if array.dtype.itemsize > 2:
        return all(np.isfinite(piece).all() for piece in pieces)
    infinity = np.array(np.inf, array.dtype).view(np.uint16)
    return all((piece.view(np.uint16) & 0x7FFF).max() < infinity for piece in pieces)
