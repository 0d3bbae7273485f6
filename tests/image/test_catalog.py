"""The catalogue: names, ids, tags, removal as docker rmi does it, filters and pruning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from hutch.errors import Busy, InvalidArgument, NotFound
from hutch.image.catalog import Images, ImageUser, image_roots
from hutch.image.records import ImageRecord, LayerRecord, RuntimeConfig
from hutch.image.selection import ImageFilter, created_at, parse_filters, prune, select
from hutch.records import Transaction
from hutch.store.database import Store

A, B, C = ("sha256:" + letter * 64 for letter in "abc")


class Users:
    """Instances by the image they use."""

    def __init__(self) -> None:
        self.by_image: dict[str, list[ImageUser]] = {}

    def __call__(self, transaction: Transaction, image_id: str) -> list[ImageUser]:
        return self.by_image.get(image_id, [])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "db")
    yield opened
    opened.close()


@pytest.fixture
def users() -> Users:
    return Users()


@pytest.fixture
def images(store: Store, users: Users) -> Images:
    return Images(store, users=users)


def record(image_id: str = A, *names: str, **more: object) -> ImageRecord:
    values: dict[str, object] = {
        "id": image_id,
        "names": names,
        "manifest_digest": image_id.replace(image_id[-1], "0"),
        "manifest_media_type": "m",
        "manifest_size": 1,
        "config_size": 1,
        "layers": (),
        **more,
    }
    return msgspec.convert(values, ImageRecord)


def name(text: str) -> str:
    return f"docker.io/library/{text}"


def test_an_image_is_found_by_name_id_and_prefix(images: Images) -> None:
    kept = images.add(record(A, name("x:1"), repo_digests=(name(f"x@{B}"),)))
    for text in ("x:1", "docker.io/library/x:1", A, A[7:], "a", "aaaa", "sha256:aa", f"x@{B}"):
        assert images.get(text) == kept, text
    assert images.get(f"x:other@{B}") == kept
    assert images.by_id(A) == kept
    assert images.find("y") is None
    for missing in ("y", "b", "sha256:b", B, "x", f"x@{C}"):
        with pytest.raises(NotFound):
            images.get(missing)


def test_a_missing_image_has_a_cure(images: Images) -> None:
    with pytest.raises(NotFound) as failure:
        images.get("debian")
    assert failure.value.hint == "hutch pull debian"


def test_a_name_goes_before_an_id(images: Images) -> None:
    images.add(record("sha256:" + "abc" + "0" * 61, name("x:1")))
    images.add(record(B, name("abc:latest")))
    assert images.get("abc").id == B
    assert images.get("sha256:abc").id.startswith("sha256:abc")


def test_an_ambiguous_prefix_is_refused(images: Images) -> None:
    images.add(record("sha256:" + "ab" + "0" * 62))
    images.add(record("sha256:" + "ac" + "0" * 62))
    with pytest.raises(InvalidArgument, match="beginning of 2"):
        images.get("a")


@pytest.mark.parametrize("text", ["", "Upper", "a b", "x@sha256:1"])
def test_what_is_neither_name_nor_id_is_refused(images: Images, text: str) -> None:
    with pytest.raises(InvalidArgument):
        images.get(text)


def test_a_name_moves_to_the_newest_image(images: Images) -> None:
    images.add(record(A, name("x:1")))
    images.add(record(B, name("x:1")))
    assert images.get("x:1").id == B
    assert images.get(A).names == ()


def test_adding_again_keeps_other_names(images: Images) -> None:
    images.add(record(A, name("x:1"), repo_digests=(name(f"x@{B}"),)))
    images.tag("x:1", "y:2")
    kept = images.add(record(A, name("x:3")))
    assert kept.names == (name("x:1"), name("y:2"), name("x:3"))
    assert kept.repo_digests == (name(f"x@{B}"),)


def test_a_tag_carries_no_digest(images: Images) -> None:
    images.add(record(A, name("x:1")))
    with pytest.raises(InvalidArgument, match="target: must not carry a digest"):
        images.tag("x:1", f"y@{A}")
    assert images.tag("x:1", "y").familiar() == "y:latest"
    assert images.tag("x:1", "y").familiar() == "y:latest"
    assert images.get("y").names == (name("x:1"), name("y:latest"))


def test_removing_one_of_several_names_only_untags(images: Images) -> None:
    images.add(record(A, name("x:1"), name("x:2"), repo_digests=(name(f"x@{B}"),)))
    assert images.remove("x:1").untagged == ("x:1",)
    done = images.remove("x:2")
    assert done.untagged == ("x:2", f"x@{B}")
    assert done.deleted == (A,)
    assert images.find("x@" + B) is None
    assert images.all() == []


def test_a_repositorys_digests_go_with_its_last_tag(images: Images) -> None:
    images.add(record(A, name("x:1"), name("y:1"), repo_digests=(name(f"x@{B}"),)))
    done = images.remove("x:1")
    assert (done.untagged, done.deleted) == (("x:1", f"x@{B}"), ())
    assert images.remove("y:1").deleted == (A,)


def test_removing_by_id_takes_all_names_of_one_repository(images: Images) -> None:
    images.add(record(A, name("x:1"), name("x:2")))
    assert images.remove("aaaa").untagged == ("x:1", "x:2")
    images.add(record(A, name("x:1"), name("y:1")))
    with pytest.raises(Busy, match="several repositories"):
        images.remove(A)
    assert images.remove(A, force=True).deleted == (A,)


def test_an_image_in_use_is_not_removed(images: Images, users: Users) -> None:
    images.add(record(A, name("x:1")))
    users.by_image[A] = [ImageUser(name="box", running=False)]
    with pytest.raises(Busy, match="stopped instance box"):
        images.remove("x:1")
    users.by_image[A] = [ImageUser(name="box", running=True)]
    for text in ("x:1", A):
        with pytest.raises(Busy, match="running instance box"):
            images.remove(text)
    with pytest.raises(Busy, match="running instance box"):
        images.remove(A, force=True)
    assert images.remove("x:1", force=True).deleted == ()
    assert images.get(A).names == ()
    users.by_image[A] = [ImageUser(name="box", running=False)]
    assert images.remove(A, force=True).deleted == (A,)


def test_removing_what_is_not_there(images: Images) -> None:
    with pytest.raises(NotFound):
        images.remove("x:1")


def test_collection_is_told_what_images_need(images: Images, store: Store) -> None:
    layer = LayerRecord(digest=B, size=1, media_type="t", diff_id=C, chain_id=C)
    kept = images.add(record(A, layers=(layer,)))
    with store.read() as transaction:
        expected = {A, B, C, f"disk:{C}", kept.manifest_digest}
        assert set(image_roots(transaction)) == expected


def test_changes_are_events(images: Images, store: Store) -> None:
    images.add(record(A, name("x:1")))
    images.tag("x:1", "y:1")
    images.note_digest(A, name(f"y@{B}"), name="y:1")
    images.remove(A, force=True)
    told = [(event.action, event.attributes["name"]) for event in store.events()]
    assert told == [
        ("pull", "x:1"),
        ("tag", "y:1"),
        ("push", "y:1"),
        ("untag", "x:1"),
        ("untag", "y:1"),
        ("untag", f"y@{B}"),
        ("delete", A),
    ]


# ---- filters -------------------------------------------------------------------------------


@pytest.fixture
def three(images: Images) -> Images:
    """Three images of three days: `old` with labels, a dangling one, `registry.test/new`."""
    labelled = RuntimeConfig(labels={"tier": "base", "k": ""})
    images.add(record(A, name("old:1.0"), created="2024-01-01T00:00:00Z", config=labelled))
    images.add(record(B, created="2024-01-02T00:00:00.123456789Z"))
    images.add(record(C, "registry.test/team/new:2", created="2024-01-03T01:00:00+01:00"))
    return images


def mapping(filters: tuple[str, ...]) -> dict[str, list[str]]:
    """Return `key=value` texts by key, as a command line gives them."""
    found: dict[str, list[str]] = {}
    for text in filters:
        key, _, value = text.partition("=")
        found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize(
    ("filters", "chosen"),
    [
        ((), "cba"),
        (("reference=old",), "a"),
        (("reference=old:1*",), "a"),
        (("reference=old:2*",), ""),
        (("reference=registry.test/*/new",), "c"),
        (("reference=*",), "ca"),
        (("dangling=true",), "b"),
        (("dangling=false",), "ca"),
        (("label=tier",), "a"),
        (("label=tier=base", "label=k"), "a"),
        (("label=tier=other",), ""),
        (("label!=tier",), "cb"),
        (("before=registry.test/team/new:2",), "ba"),
        (("since=old:1.0",), "cb"),
        (("until=2024-01-02T00:00:00+00:00",), "a"),
        (("until=24h",), "ba"),
        (("until=1704153600",), "a"),
    ],
)
def test_filters_choose_images(three: Images, filters: tuple[str, ...], chosen: str) -> None:
    wanted = parse_filters(mapping(filters), now=1704326400.0)
    assert "".join(found.id[-1] for found in select(three, wanted)) == chosen


@pytest.mark.parametrize("text", ["x", "x=1", "label=", "dangling=maybe", "until=soon"])
def test_a_bad_filter_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="filter"):
        parse_filters(mapping((text,)))


def test_a_filter_on_a_missing_image_is_told(three: Images) -> None:
    with pytest.raises(NotFound):
        select(three, ImageFilter(before="nothing"))


def test_pruning_takes_dangling_images_and_all_unused_when_told(
    three: Images, users: Users
) -> None:
    assert prune(three).deleted == (B,)
    assert prune(three).deleted == ()
    users.by_image[A] = [ImageUser(name="box", running=False)]
    assert prune(three, unused=True, only=parse_filters({"label": ["tier"]})).deleted == ()
    assert prune(three, unused=True).deleted == (C,)
    assert [left.id for left in three.all()] == [A]


@pytest.mark.parametrize("text", ["", "soon", "2024-13-01", "0001-01-01T00:00:00+14:00"])
def test_an_image_of_no_known_time_is_of_the_epoch(text: str) -> None:
    assert created_at(record(A, created=text)) <= 0
