"""Files from elsewhere: URLs and git repositories. All of it lands in scratch."""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from hashlib import new as new_hash
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from hutch.dockerfile import model
from hutch.dockerfile.source import SourceError
from hutch.engine.builder.archives import unpack_file
from hutch.engine.builder.remotes import GitSource, parse_git
from hutch.engine.builder.tree import Tree
from hutch.errors import IntegrityError, InvalidArgument, NotFound, Unavailable
from hutch.storage.overlay import Merged

if TYPE_CHECKING:
    from collections.abc import Callable

    from hutch.engine.builder.build import Build

__all__ = ["download", "fetch_git", "fetch_source", "inside", "shown_url"]

_CHUNK = 1 << 18
_MAX_DOWNLOAD = 64 << 30
_MAX_REDIRECTS = 10
_CHECKSUM = re.compile(r"(sha256|sha384|sha512):([0-9a-f]{64}|[0-9a-f]{96}|[0-9a-f]{128})")
_GIT_SAFE = (
    "-c", "protocol.allow=never", "-c", "protocol.http.allow=always",
    "-c", "protocol.https.allow=always", "-c", "protocol.git.allow=always",
    "-c", "protocol.ssh.allow=always", "-c", "core.hooksPath=/dev/null",
    "-c", "core.symlinks=true", "-c", "core.fsmonitor=false", "-c", "advice.detachedHead=false",
    "-c", "init.defaultBranch=main",
)  # fmt: skip


def fetch_source(build: Build, text: str, copy: model.Copy, held: ExitStack) -> tuple[Tree, bool]:
    """Fetch what ADD names; return it, and whether it is a tree rather than files."""
    git = parse_git(text)
    directory = held.enter_context(build.scratch("fetched"))
    if git is not None:
        if copy.checksum and not re.fullmatch(r"[0-9a-f]{7,64}", copy.checksum):
            raise SourceError("--checksum of a repository is the digest of a commit")
        commit = fetch_git(build, git, directory, keep_git_dir=copy.keep_git_dir)
        if copy.checksum and not commit.startswith(copy.checksum):
            raise IntegrityError(f"{text}: is commit {commit}, expected {copy.checksum}")
        path = inside(directory, git.directory)
        return Tree(held.enter_context(Merged([path]))), True
    if copy.checksum and _CHECKSUM.fullmatch(copy.checksum) is None:
        raise SourceError(
            f"--checksum: expected sha256:…, got {copy.checksum[:40]!r}",
        )
    name = download(build.check, text, directory, checksum=copy.checksum)
    if copy.unpack:
        target = held.enter_context(build.scratch("unpacked"))
        with open(f"{directory}/{name}", "rb", buffering=0) as file:
            unpack_file(file, target, text)
        return Tree(held.enter_context(Merged([target]))), True
    return Tree(held.enter_context(Merged([directory]))), False


def inside(directory: str, path: str) -> str:
    """Return a directory of what was fetched; its links stay in there."""
    if not path:
        return directory
    with Merged([directory]) as merged:
        where, _ = merged.resolve(os.fsencode(path))
    found = f"{directory}/{os.fsdecode(where)}"
    if not os.path.isdir(found):
        raise NotFound(f"{path}: is not a directory of the repository")
    return found


# ---- HTTP ---------------------------------------------------------------------------------


def download(check: Callable[[], None], url: str, directory: str, *, checksum: str = "") -> str:
    """Fetch a URL into a directory and return the file's name; redirects are followed. `check`
    is called between pieces, and raises where the file is not wanted any more.

    The file has mode 0600 and the time of the answer's Last-Modified, as in Docker. Raises
    `Unavailable`, or `IntegrityError` where its checksum is another.
    """
    from urllib3.exceptions import HTTPError

    try:
        urlsplit(url).port  # noqa: B018 - raises for what is no number
    except ValueError as error:
        raise InvalidArgument(f"{shown_url(url)}: is no URL: {error}", field="url") from error
    try:
        return _download(check, url, directory, checksum)
    except HTTPError as error:
        raise Unavailable(f"{shown_url(url)}: {_reason(error)}") from error


def _download(check: Callable[[], None], url: str, directory: str, checksum: str) -> str:
    from urllib3 import PoolManager, Retry, Timeout

    with PoolManager(
        retries=Retry(total=3, redirect=_MAX_REDIRECTS, backoff_factor=0.2),
        timeout=Timeout(connect=30, read=120),
    ) as pool:
        answer = pool.request("GET", url, preload_content=False, decode_content=False)
        try:
            if answer.status != 200:
                raise Unavailable(f"{shown_url(url)}: the server answered {answer.status}")
            name = _file_name(url, answer.headers.get("content-disposition", ""))
            path = f"{directory}/{name}"
            digest = new_hash(checksum.partition(":")[0] or "sha256")
            size = 0
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                for data in answer.stream(_CHUNK):
                    check()
                    size += len(data)
                    if size > _MAX_DOWNLOAD:
                        raise InvalidArgument(
                            f"{shown_url(url)}: larger than {_MAX_DOWNLOAD} bytes"
                        )
                    digest.update(data)
                    file.write(data)
            if checksum and f"{digest.name}:{digest.hexdigest()}" != checksum:
                raise IntegrityError(
                    f"{shown_url(url)}: its digest is {digest.name}:{digest.hexdigest()}, "
                    f"expected {checksum}"
                )
            modified = _time(answer.headers.get("last-modified", ""))
            os.utime(path, (modified, modified))
            return name
        finally:
            answer.release_conn()


def _file_name(url: str, disposition: str) -> str:
    match = re.search(r'filename="?([^";]+)"?', disposition)
    given = match[1] if match else unquote(urlsplit(url).path)
    name = os.path.basename(given.rstrip("/"))
    if not name or name in (".", "..") or "\0" in name or len(os.fsencode(name)) > 255:
        return "index"
    return name


def _time(text: str) -> float:
    from email.utils import parsedate_to_datetime

    try:
        return max(parsedate_to_datetime(text).timestamp(), 0.0)
    except (ValueError, TypeError):
        return 0.0


def shown_url(url: str) -> str:
    """Return a URL without what may be a password or a token in it."""
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that are those of no address
        return f"{url.partition('://')[0]}://…"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _reason(error: BaseException) -> str:
    text = str(getattr(error, "reason", "") or error)
    return text.rpartition(">: ")[2][:200] or type(error).__name__


# ---- git ----------------------------------------------------------------------------------


def fetch_git(build: Build, source: GitSource, directory: str, *, keep_git_dir: bool) -> str:
    """Check a repository out into an empty directory and return the commit.

    Only the network's protocols are allowed, for its submodules too; nothing of it is run.
    """
    _git(build, directory, "init", "--quiet")
    _git(build, directory, "remote", "add", "--", "origin", source.url)
    wanted = source.ref or "HEAD"
    try:
        _git(build, directory, "fetch", "--quiet", "--depth=1", "--", "origin", wanted)
    except Unavailable:
        # A server need not give out a commit by its digest, nor a history cut short.
        _git(build, directory, "fetch", "--quiet", "--tags", "--", "origin")
        if wanted == "HEAD":
            _git(build, directory, "remote", "set-head", "origin", "--auto")
        found = _find_ref(build, directory, wanted)
        _git(build, directory, "checkout", "--quiet", "--detach", found)
    else:
        _git(build, directory, "checkout", "--quiet", "--detach", "FETCH_HEAD")
    if os.path.exists(f"{directory}/.gitmodules"):
        _git(build, directory, "submodule", "--quiet", "update", "--init", "--recursive",
             "--depth=1")  # fmt: skip
    commit = _git(build, directory, "rev-parse", "HEAD").strip()
    epoch = float(_git(build, directory, "show", "-s", "--format=%ct", "HEAD").strip() or 0)
    if not keep_git_dir:
        _drop_git_dirs(directory)
    _set_times(directory, epoch)
    return commit


def _find_ref(build: Build, directory: str, wanted: str) -> str:
    for name in (wanted, f"origin/{wanted}"):
        try:
            spoken = _git(
                build, directory, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"
            )
            return spoken.strip()
        except Unavailable:
            continue
    raise NotFound(f"{wanted}: not in the repository")


def _drop_git_dirs(directory: str) -> None:
    from hutch.storage.removal import remove_tree

    for place, names, files in os.walk(directory):
        if ".git" in names or ".git" in files:
            fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                remove_tree(".git", dir_fd=fd)
            finally:
                os.close(fd)
        names[:] = [name for name in names if name != ".git"]


def _set_times(directory: str, epoch: float) -> None:
    """Give all files the commit's time: a checkout's would make every layer another."""
    for place, names, files in os.walk(directory):
        for name in (*names, *files):
            os.utime(f"{place}/{name}", (epoch, epoch), follow_symlinks=False)


def _git(build: Build, directory: str, *words: str) -> str:
    from hutch.process.run import spawn

    env = {
        **os.environ,
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_LFS_SKIP_SMUDGE": "1",
        "LC_ALL": "C",
    }
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        env.pop(name, None)
    out = os.memfd_create("git-out", os.MFD_CLOEXEC)
    err = os.memfd_create("git-err", os.MFD_CLOEXEC)
    try:
        argv = ["git", *_GIT_SAFE, "-C", directory, *words]
        with spawn(argv, stdout=out, stderr=err, env=env) as process:
            while process.poll() is None:
                build.check()
                build.pause(0.02)
            code = process.returncode
        if code:
            said = os.pread(err, 4096, 0).decode(errors="replace").strip().split("\n")[-1]
            raise Unavailable(f"git {words[0]}: {said[:300] or f'exit code {code}'}")
        return os.pread(out, 1 << 16, 0).decode(errors="replace")
    finally:
        os.close(out)
        os.close(err)
