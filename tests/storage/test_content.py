"""The content store: whole blobs or none, resumed, shared."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hutch.errors import Busy, Exhausted, IntegrityError, InvalidArgument, NotFound
from hutch.storage.content import ContentStore
from tests.requires import requires

DATA = os.urandom(300_000)
DIGEST = "sha256:" + hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def content(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path / "root", durable=False)


def parts(content: ContentStore) -> list[str]:
    directory = os.path.dirname(content.part_path(DIGEST))
    return os.listdir(directory) if os.path.isdir(directory) else []


def test_an_interrupt_after_a_blob_came_to_be_is_not_hidden(content: ContentStore) -> None:
    with pytest.raises(KeyboardInterrupt), content.new() as blob:
        blob.write(DATA)
        content.publish(blob._fd, blob._path, blob.digest)
        raise KeyboardInterrupt  # as in `commit`, before it has noted that all is done
    assert content.has(DIGEST)


def test_a_blob_is_read_back(content: ContentStore) -> None:
    assert not content.has(DIGEST)
    with content.writer(DIGEST, len(DATA)) as writer:
        for at in range(0, len(DATA), 1000):
            writer.write(DATA[at : at + 1000])
        assert not content.has(DIGEST)
        writer.commit()
    assert content.size(DIGEST) == len(DATA)
    assert content.read(DIGEST) == DATA
    assert [blob.digest for blob in content.list()] == [DIGEST]
    assert parts(content) == []


def test_a_sha512_blob_is_kept_apart(content: ContentStore) -> None:
    digest = "sha512:" + hashlib.sha512(DATA).hexdigest()
    content.put(DATA, digest)
    assert content.read(digest) == DATA and not content.has(DIGEST)


def test_durable_blobs_are_written_too(tmp_path: Path) -> None:
    content = ContentStore(tmp_path / "root")
    assert content.read(content.put(b"x")) == b"x"


def test_what_was_interrupted_goes_on_where_it_was(content: ContentStore) -> None:
    with content.writer(DIGEST, len(DATA)) as writer:
        writer.write(DATA[:100_000])
    with content.writer(DIGEST, len(DATA)) as writer:
        assert writer.offset == 100_000
        assert b"".join(writer.existing()) == DATA[:100_000]
        writer.write(DATA[100_000:])
        writer.commit()
    assert content.read(DIGEST) == DATA


def test_a_wrong_beginning_is_found_at_the_end_and_removed(content: ContentStore) -> None:
    with content.writer(DIGEST, len(DATA)) as writer:
        writer.write(b"?" * 1000)
    with content.writer(DIGEST, len(DATA)) as writer:
        writer.write(DATA[1000:])
        with pytest.raises(IntegrityError, match="has digest"):
            writer.commit()
    assert not content.has(DIGEST) and parts(content) == []


def test_more_than_the_stated_size_is_refused_at_once(content: ContentStore) -> None:
    with content.writer(DIGEST, 10) as writer, pytest.raises(IntegrityError, match="longer"):
        writer.write(b"x" * 11)
    assert parts(content) == []


def test_less_than_the_stated_size_is_kept_for_later(content: ContentStore) -> None:
    with content.writer(DIGEST, len(DATA)) as writer:
        writer.write(DATA[:5])
        with pytest.raises(IntegrityError, match="has 5 bytes"):
            writer.commit()
    with content.writer(DIGEST, len(DATA)) as writer:
        assert writer.offset == 5


def test_a_part_longer_than_the_blob_begins_anew(content: ContentStore) -> None:
    with content.writer(DIGEST) as writer:
        writer.write(DATA + b"more")
    with content.writer(DIGEST, len(DATA)) as writer:
        assert writer.offset == 0
        writer.write(DATA)
        writer.commit()


def test_a_writer_waits_for_the_one_before(content: ContentStore) -> None:
    first = content.writer(DIGEST, len(DATA))
    with pytest.raises(Busy):
        content.writer(DIGEST, len(DATA), timeout_s=0)
    seen: list[bool] = []

    def second() -> None:
        with content.writer(DIGEST, len(DATA)) as writer:
            seen.append(writer.complete)

    thread = threading.Thread(target=second)
    thread.start()
    first.write(DATA)
    first.commit()
    thread.join(60)
    assert seen == [True]


def test_a_missing_blob_is_not_found(content: ContentStore) -> None:
    for call in (content.size, content.open, content.read):
        with pytest.raises(NotFound):
            call(DIGEST)
    assert content.delete(DIGEST) is False


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:../../x", "md5:" + "0" * 32, "x" * 64])
def test_what_is_no_digest_is_refused(content: ContentStore, digest: str) -> None:
    for call in (content.has, content.path, content.delete, content.writer):
        with pytest.raises(InvalidArgument):
            call(digest)


def test_a_blob_damaged_on_disk_is_not_given_out(content: ContentStore) -> None:
    content.put(DATA)
    os.chmod(content.path(DIGEST), 0o600)
    with open(content.path(DIGEST), "r+b") as file:
        file.write(b"damage")
    with pytest.raises(IntegrityError, match="damaged"):
        content.read(DIGEST)


def test_a_stream_of_unknown_digest_is_stored(content: ContentStore) -> None:
    blob = content.ingest([DATA[:10], DATA[10:]])
    assert (blob.digest, blob.size) == (DIGEST, len(DATA))
    assert content.read(DIGEST) == DATA
    assert content.ingest([DATA]).digest == DIGEST
    assert parts(content) == []


def test_a_stream_that_fails_leaves_nothing(content: ContentStore) -> None:
    def chunks() -> object:
        yield b"x"
        raise RuntimeError("cable")

    with pytest.raises(RuntimeError):
        content.ingest(chunks())  # type: ignore[arg-type]
    assert parts(content) == [] and list(content.list()) == []


def test_old_parts_are_cleaned_unless_in_use(content: ContentStore) -> None:
    with content.writer(DIGEST, len(DATA)) as writer:
        writer.write(DATA)
        assert content.clean_ingest(older_than_s=0, now=time.time() + 10) == 0
    assert content.clean_ingest() == 0
    assert content.clean_ingest(older_than_s=0, now=time.time() + 10) == len(DATA)
    assert parts(content) == []


@requires("root")
@pytest.mark.integration
def test_a_full_disk_is_said_and_can_be_resumed(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "small", str(small)], check=True)
    try:
        content = ContentStore(small, durable=False)
        with content.writer(DIGEST, len(DATA)) as writer:
            with pytest.raises(Exhausted) as caught:
                writer.write(DATA)
            assert "prune" in (caught.value.hint or "")
        subprocess.run(["mount", "-o", "remount,size=1m", str(small)], check=True)
        with content.writer(DIGEST, len(DATA)) as writer:
            assert 0 < writer.offset < len(DATA)
            writer.write(DATA[writer.offset :])
            writer.commit()
        assert content.read(DIGEST) == DATA
    finally:
        subprocess.run(["umount", str(small)], check=True)


WRITER = """
import sys
from hutch.storage.content import ContentStore
root, digest, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
with ContentStore(root, durable=False).writer(digest, size) as writer:
    print("locked", "complete" if writer.complete else writer.offset, flush=True)
    while not writer.complete:
        data = sys.stdin.buffer.read(1000)
        if not data:
            writer.commit()
            print("done", flush=True)
            break
        writer.write(data)
        if writer.offset == 150_000:
            print("half", flush=True)
"""


def start_writer(root: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), DIGEST, str(len(DATA))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_a_killed_writer_leaves_its_part_and_no_lock(tmp_path: Path) -> None:
    content = ContentStore(tmp_path, durable=False)
    with start_writer(tmp_path) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        assert writer.stdout.readline() == b"locked 0\n"
        writer.stdin.write(DATA[:150_000])
        writer.stdin.flush()
        assert writer.stdout.readline() == b"half\n"
        writer.kill()
    assert not content.has(DIGEST)
    with content.writer(DIGEST, len(DATA), timeout_s=5) as resumed:
        assert resumed.offset == 150_000
        resumed.write(DATA[resumed.offset :])
        resumed.commit()
    assert content.read(DIGEST) == DATA


def test_of_two_processes_one_writes_and_both_have_it(tmp_path: Path) -> None:
    with start_writer(tmp_path) as first:
        assert first.stdin is not None and first.stdout is not None
        assert first.stdout.readline() == b"locked 0\n"
        with start_writer(tmp_path) as second:
            assert second.stdout is not None
            first.stdin.write(DATA)
            first.stdin.close()
            assert first.stdout.read() == b"half\ndone\n"
            assert second.stdout.readline() == b"locked complete\n"
    assert ContentStore(tmp_path).read(DIGEST) == DATA
