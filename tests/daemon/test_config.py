"""What `daemon.json` may say, and how it goes with the command line."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from hutch.daemon.config import load_config, merge
from hutch.daemon.listen import Tls, open_listeners
from hutch.errors import Busy, InvalidArgument, NotFound


def test_dockers_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "daemon.json"
    path.write_text(
        '{"hosts": ["unix:///x"], "log-driver": "none", "default-shm-size": "1m",'
        ' "default-ulimits": {"nofile": {"Name": "nofile", "Soft": 10, "Hard": 20}},'
        ' "labels": ["a=b"], "live-restore": false, "dns": ["10.0.0.1"]}'
    )
    config = load_config(str(path), must_exist=True)
    assert config.hosts == ("unix:///x",)
    options = config.front_options()
    assert options.default_ulimits == ("nofile=10:20",)
    assert options.default_shm_size == 1 << 20
    assert (options.log_driver, options.labels) == ("none", ("a=b",))
    assert options.dns == ("10.0.0.1",)
    assert options.live_restore is False


@pytest.mark.parametrize(
    "text",
    ['{"bip": "10.0.0.1/24"}', "[]", "{", '{"hosts": "unix:///x"}', '{"debug": 1}'],
)
def test_what_is_not_known_or_wrong_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "daemon.json"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=r"daemon\.json"):
        load_config(str(path), must_exist=True)


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.json")
    assert load_config(missing, must_exist=False).hosts == ()
    with pytest.raises(NotFound):
        load_config(missing, must_exist=True)


def test_hosts_are_said_in_one_place(tmp_path: Path) -> None:
    path = tmp_path / "daemon.json"
    path.write_text('{"hosts": ["unix:///x"]}')
    config = load_config(str(path), must_exist=True)
    assert merge(config, hosts=(), debug=True).debug
    with pytest.raises(InvalidArgument, match="hosts"):
        merge(config, hosts=("unix:///y",))


@pytest.mark.parametrize(
    "host", ["tcp://127.0.0.1:0", "tcp://127.0.0.1:x", "nothing", "ftp://x", "tcp://h:99999"]
)
def test_what_is_not_safe_or_no_address_is_refused(host: str) -> None:
    with pytest.raises(InvalidArgument, match=r"hosts|tcp"):
        open_listeners(host, group="", tls=None, insecure=host.endswith("9"))


def test_tls_without_client_certificates_has_to_be_forced() -> None:
    with pytest.raises(InvalidArgument) as caught:
        open_listeners("tcp://127.0.0.1:0", group="", tls=Tls(), insecure=False)
    assert "--tlsverify" in (caught.value.hint or "")


def test_a_socket_that_answers_is_not_taken_away(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    (first,) = open_listeners(f"unix://{path}", group="", tls=None, insecure=False)
    with pytest.raises(Busy):
        open_listeners(f"unix://{path}", group="", tls=None, insecure=False)
    first.socket.close()  # as a daemon that was killed leaves it
    (second,) = open_listeners(f"unix://{path}", group="", tls=None, insecure=False)
    second.close()
    assert not (tmp_path / "s").exists()


def test_a_socket_has_no_name_before_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "s")
    rename = os.rename
    named: list[str] = []

    def seen(source: str, target: str) -> None:
        assert os.listdir(tmp_path) == [os.path.basename(source)]
        assert os.stat(source).st_mode & 0o777 == 0o660
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(source)
        named.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", seen)
    (listener,) = open_listeners(f"unix://{path}", group="", tls=None, insecure=False)
    listener.close()
    assert named == [path]


def test_what_is_no_socket_stays(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(InvalidArgument):
        open_listeners(f"unix://{tmp_path}/s", group="", tls=None, insecure=False)
    assert (tmp_path / "s").read_text() == "precious"


def test_a_group_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no-such-group"):
        open_listeners(f"unix://{tmp_path}/s", group="no-such-group", tls=None, insecure=False)
