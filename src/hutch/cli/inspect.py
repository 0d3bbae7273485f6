"""`inspect`, and the `inspect` of images, networks and volumes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hutch.cli.command import FORMAT, Command
from hutch.cli.exitcodes import report
from hutch.cli.options import UsageError
from hutch.cli.output import print_json
from hutch.cli.session import Invocation
from hutch.errors import HutchError, InvalidArgument, NotFound

__all__ = ["COMMANDS"]

Finder = Callable[[Invocation, str], dict[str, Any]]


def _instance(invocation: Invocation, name: str) -> dict[str, Any]:
    from hutch.cli.shapes import instance_shape

    instance = invocation.engine.get(name)
    shape = instance_shape(instance.info())
    if invocation.flag("size"):
        size = instance.disk_size()
        shape |= {"SizeRw": size.writable, "SizeRootFs": size.total}
    return shape


def _image(invocation: Invocation, name: str) -> dict[str, Any]:
    from hutch.cli.object_shapes import image_shape

    return image_shape(invocation.engine.images.get(name))


def _network(invocation: Invocation, name: str) -> dict[str, Any]:
    from hutch.cli.object_shapes import network_shape

    networks = invocation.engine.networks
    return network_shape(networks.get(name), networks.members(name))


def _volume(invocation: Invocation, name: str) -> dict[str, Any]:
    from hutch.cli.object_shapes import volume_shape

    return volume_shape(invocation.engine.volumes.get(name))


_FINDERS: dict[str, Finder] = {
    "container": _instance,
    "image": _image,
    "network": _network,
    "volume": _volume,
}


def _any(invocation: Invocation, name: str) -> dict[str, Any]:
    """Find an object of any kind, instances first; as Docker does."""
    for finder in _FINDERS.values():
        try:
            return finder(invocation, name)
        except NotFound:
            continue
        except InvalidArgument:
            if finder is _instance:
                raise  # ambiguous
            continue
    raise NotFound(f"no such object: {name}", hint="`hutch ps -a` and `hutch images` list them")


def _inspect(invocation: Invocation) -> int:
    kind = invocation.options.get("type", "")
    words = invocation.words.split()
    if len(words) == 2:
        kind = words[0]
    if kind and kind not in _FINDERS:
        raise UsageError(f"--type: expected one of {', '.join(_FINDERS)}, got {kind!r}")
    finder = _FINDERS[kind] if kind else _any
    found: list[dict[str, Any]] = []
    code = 0
    for name in invocation.arguments:
        try:
            found.append(finder(invocation, name))
        except HutchError as exc:
            code = report(exc, as_json=invocation.json)
    _show(invocation.options.get("format"), found)
    return code


def _show(template: str | None, found: list[dict[str, Any]]) -> None:
    if template in (None, "", "json"):
        print_json(found)
        return
    from hutch.cli.template import Template

    compiled = Template(template)
    for shape in found:
        print(compiled.render(shape))


_FORMAT = (FORMAT[0], "f", *FORMAT[2:])


def _command(noun: str, example: str, *, typed: bool = False) -> Command:
    options: tuple[Any, ...] = (
        _FORMAT,
        ("size", "s", "flag", "", "Show the sizes of instances as well"),
    )
    if noun == "networks":
        options = (_FORMAT, ("verbose", "v", "flag", "", "Accepted, without effect"))
    if noun in ("volumes", "images"):
        options = (_FORMAT,)
    if typed:
        options = (*options, ("type", "", "text", "KIND", "container, image, network or volume"))
    return Command(
        handler=_inspect,
        summary=f"Show everything about {noun}, as JSON in Docker's shape.",
        arguments="NAME [NAME...]",
        low=1,
        high=-1,
        options=options,
        examples=(example,),
    )


COMMANDS = {
    "inspect": _command(
        "instances, images, networks and volumes",
        "hutch inspect -f '{{.State.ExitCode}} {{.NetworkSettings.IPAddress}}' web",
        typed=True,
    ),
    "image inspect": _command("images", "hutch image inspect busybox"),
    "network inspect": _command("networks", "hutch network inspect bridge"),
    "volume inspect": _command("volumes", "hutch volume inspect data"),
}
