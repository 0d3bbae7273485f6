"""Arguments and their scopes, stages and what they need, effects on the configuration."""

from __future__ import annotations

from typing import Any

import pytest

from hutch.dockerfile import SourceError, parse_dockerfile, plan_stages
from hutch.dockerfile.config import apply, environment
from hutch.dockerfile.mounts import RunMount, parse_mount
from hutch.dockerfile.scopes import Arguments, Platform, Scope

_HERE = Platform(os="linux", architecture="amd64")


def arguments(text: str, **given: str) -> Arguments:
    """Return the arguments of a Dockerfile, those before FROM taken in."""
    found = Arguments(given, build=_HERE, target=_HERE)
    for instruction in parse_dockerfile(text.encode()).arguments:
        found.declare(instruction, "\\")
    return found


def configured(text: str, config: dict[str, Any] | None = None, **given: str) -> dict[str, Any]:
    """Return what the instructions of one stage make of a configuration."""
    known = arguments(text, **given)
    result = dict(config or {})
    scope = Scope(known, "\\")
    scope.env = environment(result)
    for instruction in parse_dockerfile(text.encode()).stages[0].instructions:
        apply(result, instruction, scope, "\\")
    return result


def needed(text: str, target: str = "", **given: str) -> list[int]:
    """Return the indices of the stages that a target needs."""
    plan = plan_stages(parse_dockerfile(text.encode()), arguments(text, **given), target)
    return [stage.stage.index for stage in plan.stages]


def test_only_what_the_target_needs_is_built() -> None:
    text = (
        "FROM a AS base\nFROM base AS unused\nFROM b AS tool\nFROM base AS app\n"
        "COPY --from=tool /x /x\nRUN --mount=from=3,target=/y z\nFROM c AS four\n"
    ).replace("from=3", "from=tool")
    assert needed(text, "app") == [0, 2, 3]
    assert needed(text, "four") == [4]
    assert needed(text) == [4]
    assert needed(text, "2") == [2]


def test_a_stage_may_be_named_by_its_number_and_hides_an_image_of_its_name() -> None:
    text = "FROM a AS busybox\nFROM busybox\nCOPY --from=0 /x /x\n"
    plan = plan_stages(parse_dockerfile(text.encode()), arguments(text))
    assert plan.stages[1].parent == 0 and plan.stages[1].image == ""


def test_a_stage_may_read_one_further_down_which_is_built_before() -> None:
    text = (
        "FROM x AS a\nRUN --mount=from=c,target=/c true\nFROM x AS unused\nFROM x AS c\n"
        "FROM x AS b\nCOPY --from=a /x /x\nCOPY --from=2 /x /x\nFROM b\n"
    )
    plan = plan_stages(parse_dockerfile(text.encode()), arguments(text))
    assert [one.stage.index for one in plan.stages] == [2, 0, 3, 4]
    with pytest.raises(SourceError) as caught:
        needed("FROM x AS a\nRUN true\nCOPY --from=b /x /x\nFROM a AS b")
    assert caught.value.first == 3


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [
        ("FROM a", "x", "target stage 'x'"),
        ("ARG X\nFROM $X", "", "image is empty"),
        ("FROM a AS b\nCOPY --from=b /x /x", "", "cannot read itself"),
        (
            "FROM x AS a\nCOPY --from=b /x /x\nFROM a AS b",
            "",
            "each other: 'a' reads 'b' reads 'a'",
        ),
        ("FROM x\nCOPY --from=1 /x /x\nFROM x\nCOPY --from=0 /x /x", "", "'0' reads '1' reads '0'"),
        ("FROM x\nCOPY --from=0 /x /x\n", "", "stage '0' cannot read itself"),
        ("ARG X\nFROM a\nCOPY --from=$X /x /x", "", "takes no variables"),
        ("FROM a\nRUN --mount=type=x,target=/a,from=b y", "", "unknown type"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(text: str, target: str, message: str) -> None:
    with pytest.raises(SourceError, match=message.replace("$", r"\$")):
        needed(text, target)


def test_arguments_before_from_are_known_to_from_and_where_they_are_declared_again() -> None:
    text = "ARG V=1\nARG W=$V.2\nFROM x:$W\nENV A=$V\nARG V\nENV B=$V\n"
    plan = plan_stages(parse_dockerfile(text.encode()), arguments(text))
    assert plan.stages[0].image == "x:1.2"
    assert configured(text)["Env"] == ["A=", "B=1"]
    assert configured(text, V="9")["Env"] == ["A=", "B=9"]


def test_a_given_argument_goes_before_a_default_and_the_environment_before_both() -> None:
    text = "FROM x\nARG A=1\nENV R=$A\nENV A=env\nENV S=$A\nARG A=2\nENV T=$A\n"
    assert configured(text, A="9")["Env"] == ["R=9", "A=env", "S=env", "T=env"]


def test_platforms_are_known_once_they_are_declared() -> None:
    text = (
        "FROM --platform=$BUILDPLATFORM x\nENV A=$TARGETARCH\nARG TARGETARCH\nENV B=$TARGETARCH\n"
    )
    plan = plan_stages(parse_dockerfile(text.encode()), arguments(text))
    assert plan.stages[0].platform == "linux/amd64"
    assert configured(text)["Env"] == ["A=", "B=amd64"]


def test_unused_arguments_are_told_but_not_proxies() -> None:
    known = arguments("ARG A\nFROM x", A="1", B="2", HTTP_PROXY="p", BUILDKIT_INLINE_CACHE="1")
    assert known.unused() == ["B"]


def test_an_environment_uses_what_was_before_its_instruction() -> None:
    text = "FROM x\nENV a=hello\nENV a=bye d=$a\nENV e=$a\n"
    assert configured(text)["Env"] == ["a=bye", "d=hello", "e=bye"]


def test_instructions_change_the_configuration() -> None:
    text = (
        "FROM x\nWORKDIR /a\nWORKDIR b/../c\nUSER 1:2\nEXPOSE 80 90-91/udp 1:53/tcp\n"
        'VOLUME rel /abs\nLABEL a=b\nSTOPSIGNAL SIGINT\nSHELL ["/bin/bash", "-c"]\n'
        "CMD echo $x\nHEALTHCHECK --retries=2 CMD a\nONBUILD RUN y\nMAINTAINER me\n"
    )
    assert configured(text, {"Labels": {"old": "1"}, "Unknown": 7}) == {
        "Unknown": 7,
        "WorkingDir": "/a/c",
        "User": "1:2",
        "ExposedPorts": {"53/tcp": {}, "80/tcp": {}, "90/udp": {}, "91/udp": {}},
        "Volumes": {"/a/c/rel": {}, "/abs": {}},
        "Labels": {"old": "1", "a": "b"},
        "StopSignal": "SIGINT",
        "Shell": ["/bin/bash", "-c"],
        "Cmd": ["/bin/bash", "-c", "echo $x"],
        "Healthcheck": {"Test": ["CMD-SHELL", "a"], "Retries": 2},
        "OnBuild": ["RUN y"],
    }


def test_an_entrypoint_drops_the_command_of_the_base_but_not_the_stages_own() -> None:
    base = {"Cmd": ["sh"]}
    assert configured('FROM x\nENTRYPOINT ["a"]', base) == {"Entrypoint": ["a"]}
    both = configured('FROM x\nCMD ["b"]\nENTRYPOINT ["a"]', base)
    assert both == {"Entrypoint": ["a"], "Cmd": ["b"]}


@pytest.mark.parametrize(
    "text",
    ["EXPOSE x", "EXPOSE 0", "EXPOSE 9-8", "EXPOSE 80/icmp", "EXPOSE 99999", "STOPSIGNAL NONE",
     "USER a:b:c", "USER $unset", "WORKDIR $unset", "VOLUME $unset", "LABEL $unset=x"],
)  # fmt: skip
def test_values_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(SourceError):
        configured(f"FROM x\n{text}\n")


MOUNTS = [
    ("type=cache,target=c", RunMount(type="cache", target="/w/c", id="/w/c")),
    ("type=cache,dst=/c,id=x,sharing=locked,uid=1,gid=2,mode=0700,ro",
     RunMount(type="cache", target="/c", id="x", sharing="locked", uid=1, gid=2, mode=0o700,
              read_only=True)),
    ("target=/b", RunMount(target="/b", read_only=True)),
    ("type=bind,source=s,destination=/b,from=f,rw", RunMount(target="/b", source="s", from_="f")),
    ("type=bind,target=/b,readonly=false", RunMount(target="/b")),
    ("type=tmpfs,target=/t,size=1m", RunMount(type="tmpfs", target="/t", size=1 << 20)),
    ("type=secret,id=s", RunMount(type="secret", id="s", target="/run/secrets/s")),
    ("type=secret,target=/x/y", RunMount(type="secret", id="y", target="/x/y")),
    ("type=secret,id=s,env=S,required",
     RunMount(type="secret", id="s", env="S", required=True)),
    ("type=ssh", RunMount(type="ssh", id="default")),
    ('type=bind,"target=/a,b"', RunMount(target="/a,b", read_only=True)),
    ("type=cache,target=/$V", RunMount(type="cache", target="/v", id="/v")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), MOUNTS, ids=[text for text, _ in MOUNTS])
def test_a_mount_of_a_run_is_read(text: str, wanted: RunMount) -> None:
    assert parse_mount(text, lambda value: value.replace("$V", "v"), "/w") == wanted


@pytest.mark.parametrize(
    "text",
    ["type=x", "type=cache", "target=/", "target=/../", "type=cache,target=/a,sharing=x",
     "type=tmpfs,target=/a,uid=1", "type=secret", "target=/a,from=$X", "target=/a,rw=maybe",
     "type=cache,target=/a,mode=9", "type=cache,target=/a,uid=x", "nonsense",
     "type=tmpfs,target=/a,size=x"],
)  # fmt: skip
def test_a_mount_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(SourceError):
        parse_mount(text, lambda value: value, "/")
