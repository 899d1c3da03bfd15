"""Digests of a checkpoint's files: who takes them, who checks them, and what nobody misses."""

import json
from pathlib import Path

import pytest

from kava_jax.journal import digests
from kava_jax.journal.digests import damage, write_digests, write_own_digests

# As Orbax names them with three processes.
OWN = {
    0: ["array_metadatas/process_0", "ocdbt.process_0/manifest.ocdbt"],
    1: ["array_metadatas/process_1", "ocdbt.process_1/d/0c81", "ocdbt.process_1/manifest.ocdbt"],
    12: ["array_metadatas/process_12", "ocdbt.process_12/d/77aa"],
}
OTHERS = ["_METADATA", "d/92fe", "manifest.ocdbt"]
EVERY = [*OTHERS, *(name for own in OWN.values() for name in own)]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    for name in EVERY:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for process in OWN:
        write_own_digests(tmp_path, process)
    write_digests(tmp_path)
    return tmp_path


def test_every_process_lists_its_own_files_and_the_first_one_the_rest(written: Path):
    for process, own in OWN.items():
        assert sorted(json.loads((written / f"sha256.{process}.json").read_text())) == own
    lists = [f"sha256.{process}.json" for process in OWN]
    assert sorted(json.loads((written / "sha256.json").read_text())) == sorted([*OTHERS, *lists])


@pytest.mark.parametrize("processes", [1, 2, 3, 13, 20])
def test_every_file_is_read_by_one_process(written, processes, monkeypatch):
    """The small lists of digests apart. As many as wrote: each reads what it wrote itself."""
    taken, read = digests._digest, []
    monkeypatch.setattr(digests, "_digest", lambda path: read.append(path) or taken(path))
    by_process = {}
    for process in range(processes):
        read.clear()
        assert damage(written, process, processes) is None
        names = [path.relative_to(written).as_posix() for path in read]
        by_process[process] = [name for name in names if not name.startswith("sha256")]
    everything = [name for names in by_process.values() for name in names]
    assert sorted(everything) == sorted(EVERY)
    if processes == 13:
        for process, own in OWN.items():
            assert sorted(set(by_process[process]) - set(OTHERS)) == own


@pytest.mark.parametrize("name", [*EVERY, "sha256.1.json", "sha256.json"])
@pytest.mark.parametrize("spoil", ["change", "remove"])
def test_somebody_notices_whatever_happens_to_a_file(written, name, spoil):
    if spoil == "remove":
        (written / name).unlink()
    else:
        (written / name).write_text("{}")
    for processes in (1, 2, 13):
        found = [damage(written, process, processes) for process in range(processes)]
        told = [words for words in found if words]
        assert told
        assert all(name in words for words in told)


def test_a_checkpoint_of_an_earlier_version_is_checked_by_the_first_process(written):
    """It has one list of everything."""
    for process in OWN:
        (written / f"sha256.{process}.json").unlink()
    write_digests(written)
    assert damage(written) is None
    (written / "ocdbt.process_1/d/0c81").write_text("changed")
    assert damage(written, 1, 2) is None
    assert damage(written, 0, 2) == "ocdbt.process_1/d/0c81 has changed since it was written"
