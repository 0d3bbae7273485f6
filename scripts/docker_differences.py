"""Where hutch answers otherwise than Debian's dockerd 20.10, and why: `make compare-docker` fails
for what is not named here, and for a name that nothing goes by any more."""

from __future__ import annotations

from scripts.docker_answers import Difference

__all__ = ["NAMED", "named"]

_INSPECTED = r"(rich inspected|paused: inspected|life inspected|no program: inspected|execs of).*"
_LISTED = r"(rich in the list|list \d+|df)"
_BOTH = rf"({_INSPECTED}|{_LISTED})"
_IMAGE = r"(image|committed:|built:) ?inspected"
_NEWER = "the field came after Docker 20.10"


def named(why: str, *places: tuple[str, str]) -> tuple[Difference, ...]:
    """Return one reason for differences at several places."""
    return tuple(Difference(step, path, why) for step, path in places)


NAMED: tuple[Difference, ...] = (
    # ---- the server -----------------------------------------------------------------------
    *named(
        "versions, runtimes, plug-ins and what the kernel can do are hutch's own; the rest came "
        "or went after Docker 20.10",
        (
            "version",
            r"\.body\.(ApiVersion|MinAPIVersion|BuildTime|Components|GitCommit|GoVersion|"
            r"Version|Platform\.Name)",
        ),
        (
            "info",
            r"\.body\.(BridgeNfIp6?tables|CDISpecDirs|ContainerdCommit\..*|RuncCommit\..*|"
            r"DefaultRuntime|DriverStatus|InitBinary|KernelMemory(TCP)?|LiveRestoreEnabled|"
            r"Plugins\..*|RegistryConfig\..*|Runtimes\..*|SecurityOptions|ServerVersion)",
        ),
    ),
    # ---- errors ---------------------------------------------------------------------------
    *named(
        "errors say in hutch's own words which field is wrong and what helps",
        (r"refused: .*", r"\.body\.message"),
        (r"(images|networks|volumes) filtered \d+", r"\.body\.message"),
        (r"list \d+", r"\.body\.message"),
        (r"(network|volume) .*", r"\.body\.message"),
        (r"(image tagged|none|none removed|no) .*", r"\.body\.message"),
        (r"none: POST /containers/nonesuch/kill", r"\.body\.message"),
        (r"none (saved|joined|/images.*)", r"\.body\.message"),
        (r"(auth|search) without a (name|term)", r"\.body\.message"),
        (r"(made|paused): (kill|top|exec|removed)", r"\.body\.message"),
        (r"(running removed|image in use removed)", r"\.body\.message"),
        (r"(a bad signal|a directory run|a file as directory)", r"\.body\.message"),
        (r"rich top without PID", r"\.body\.message"),
        (r"(containers |volumes )?pruned badly", r"\.body\.message"),
        (r"(archive|no archive) .*", r"\.body\.message"),
        (r"committed badly", r"\.body\.message"),
        (r"logs stdout=1&since=nonsense", r"\.body\.message"),
        (r"exec .* resized", r"\.body\.message"),
        (r"exec (absent|nobody) started", r"\.body\.stdout"),
        (r"build,? .*", r"\.body(\.message|\[\]\.error|\[\]\.errorDetail\.message)"),
        (r"events, (wrong order|bad time)", r"\.body\.message"),
        (r"no program: inspected", r"\.body\.State\.Error"),
        (r"(run, no program|rm, running)", r"\.errors(\[\])?"),
    ),
    *named(
        "what the client did wrong is answered with 400, 403, 404 or 409, as by newer Docker, "
        "where 20.10 answers 500",
        (r"(auth|search) without a (name|term)", r"\.status"),
        (r"image tagged (wrongly|without)", r"\.status"),
        (r"network (made without a name|of no subnet|left twice)", r"\.status"),
        (r"networks filtered 7", r"\.status"),
        (r"refused: (a bad bind|a relative target|a wrong type|no JSON)", r"\.status"),
        (r"(made: unpause|unpaused twice|rich top without PID|no user)", r"\.status"),
        (r"a file as directory", r"\.status"),
        (r"logs stdout=1&since=nonsense", r"\.status"),
        (r"exec .* resized", r"\.status"),
        (r"archive (put on a file|(got|told) /made/in/)", r"\.status"),
        (r"list (18|21|22|23)", r"\.status"),
        (r"build without a Dockerfile", r"\.status"),
        (r"events, bad time", r"\.status"),
    ),
    *named(
        "an error known before the answer begins has its status and a JSON body, where Docker "
        "has begun a stream already",
        (r"load nothing", r"\.(status|body\.(message|error|errorDetail))"),
        (r"none pushed", r"\.(status|body)"),
        (r"none: POST /containers/nonesuch/attach", r"\.(body|type)"),
        (r"attached badly", r"\.(body|type)"),
        (r"exec .* again", r"\.(status|type|body\.(message|stdout))"),
    ),
    *named(
        "a filter or condition that is not known is refused, where 20.10 passes it over",
        (r"events, bad filter", r"\.(status|body)"),
        (r"a bad condition", r"\.(status|body\.(message|StatusCode))"),
    ),
    # ---- containers -----------------------------------------------------------------------
    *named(
        _NEWER,
        (_BOTH, r"\.body(\.|\[\]\.|\.Containers\[\]\.)NetworkSettings\.Networks\..*\.DNSNames"),
        (_BOTH, r"\.body(\.|\[\]\.|\.Containers\[\]\.)NetworkSettings\.Networks\..*\.GwPriority"),
        (r"networks? .*", r"\.body(\[\])?\.EnableIPv4"),
    ),
    *named(
        "newer Docker tells `bridge` and `no` too",
        (_BOTH, r"\.body(\.|\[\]\.|\.Containers\[\]\.)HostConfig\.NetworkMode"),
        (_INSPECTED, r"\.body\.HostConfig\.RestartPolicy\.Name"),
    ),
    *named(
        "newer Docker has these no more",
        (_INSPECTED, r"\.body\.HostConfig\.KernelMemory(TCP)?"),
        (_IMAGE, r"\.body\.(Container|ContainerConfig)"),
        (r"(streams |terminal )?waited|a bad condition", r"\.body\.Error"),
        (r"rich inspected, joined", r"\.body\.NetworkSettings\.Networks\.compare-net\.Aliases"),
    ),
    *named(
        "a container is told from its specification: empty lists are lists, sizes are in bytes, "
        "defaults are told, temporary file systems are in `Tmpfs` however they were asked for",
        (
            _INSPECTED,
            r"\.body\.HostConfig\.(Devices|Dns|DnsOptions|DnsSearch|PortBindings|Ulimits)",
        ),
        (_INSPECTED, r"\.body\.HostConfig\.(LogConfig\.Config\.max-size|Mounts|Tmpfs\..*)"),
        (_INSPECTED, r"\.body\.Config\.(StopSignal|StopTimeout|Healthcheck\.Timeout)"),
        (_BOTH, r"\.body(\[\])?\.Mounts"),
    ),
    *named(
        "whoever attaches says to what",
        (_INSPECTED, r"\.body\.Config\.Attach(Stdout|Stderr)"),
    ),
    *named(
        "what is published is exposed, and reached",
        (_INSPECTED, r"\.body\.Config\.ExposedPorts\.80/tcp"),
        (_INSPECTED, r"\.body\.NetworkSettings\.Ports\.80/tcp"),
        (r"rich in the list", r"\.body\[\]\.Ports"),
    ),
    *named(
        "a control group name space of its own is the default, on either version of cgroups",
        (_INSPECTED, r"\.body\.HostConfig\.CgroupnsMode"),
    ),
    *named("there is no runc", (_INSPECTED, r"\.body\.HostConfig\.Runtime")),
    *named("more is masked, as by newer Docker", (_INSPECTED, r"\.body\.HostConfig\.MaskedPaths")),
    *named(
        "directories of layers are made when a container starts, and gone when it ends",
        (rf"({_INSPECTED}|{_IMAGE})", r"\.body\.GraphDriver\.Data\..*"),
    ),
    *named(
        "paths and network are known before the first start; a network name space is gone with "
        "the container's end, and `none` has no endpoint",
        (_INSPECTED, r"\.body\.(HostnamePath|HostsPath|LogPath|ResolvConfPath)"),
        (_INSPECTED, r"\.body\.NetworkSettings\.Sandbox(ID|Key)"),
        (_BOTH, r"\.body.*\.NetworkSettings\.Networks\.bridge\.NetworkID"),
        (_BOTH, r"\.body.*\.NetworkSettings\.Networks\.none\.EndpointID"),
    ),
    *named("`expose` looks at what is exposed, on whatever network", (r"list 14", r"\.body")),
    *named(
        "sizes count what is on disk, directories too",
        (r"(list \d+|df)", r"\.body.*\.SizeRw"),
        (r"pruned", r"\.body\.SpaceReclaimed"),
    ),
    *named(
        "this kernel's groups count no requests of devices; fail counts are told",
        (r"rich stats", r"\.body\.(blkio_stats\..*|memory_stats\.failcnt)"),
    ),
    *named("newer Docker names the type", (r"(logs|terminal logs).*", r"\.type")),
    *named(
        "a program that is not there ends with 127, as in a shell",
        (r"exec absent after", r"\.body\.ExitCode"),
    ),
    *named(
        "20.10 cannot give capabilities to a user other than root where it has not all of them",
        (r"exec rich (started|after)", r"\.body\.(stdout|ExitCode|Pid)"),
    ),
    *named(
        "what could not be started has not started",
        (r"events of containers", r"\.exec_start: (/nonesuch|true) "),
    ),
    *named(
        "newer Docker looks for the user when the program is made",
        (r"exec nobody( .*)?", r"\.(status|type|body.*)"),
        ("events of containers", r"\.exec_create: true "),
    ),
    *named(
        "newer Docker's events tell how long a container ran, and that an image was made of one",
        ("events of a container", r"\.body\[\]\.Actor\.Attributes\.execDuration"),
        ("events of kind image", r"\.create"),
    ),
    *named("the first process is hutch's supervisor", (r"rich top", r"\.body\.Processes\[\]\[\]")),
    *named("a loaded image has a name", (r"image inspected", r"\.body\.Metadata\.LastTagTime")),
    *named(
        "places to mount `/etc/hosts` and the like on are made in an image that has none",
        (r"diff", r"\.output"),
    ),
    # ---- images and builds ----------------------------------------------------------------
    *named(
        "directories that COPY --chown makes on the way belong to that owner, as with BuildKit",
        (r"dockerfile with copies", r"\.files\.own\.owner\[\]"),
    ),
    *named(
        "a layer's size is that of its archive",
        (rf"({_IMAGE}|images filtered \d+|.* history|df)", r"\.body.*\.(Virtual)?Size"),
        (r"history", r"\.output\[\]"),
    ),
    *named(
        "an image knows neither the one it was made from nor the program that made it",
        (_IMAGE, r"\.body\.(Parent|DockerVersion|Config\.(Image|Hostname))"),
        (r".* ?history", r"\.body\[\]\.(Id|Tags)"),
    ),
    *named(
        "steps are told as BuildKit does, and none has a container to tell of",
        (r"built", r"\.body"),
        (r"build of a failing step", r"\.body"),
        (r"built: history", r"\.body\[\]\.(Comment|CreatedBy)"),
        (r"built: inspected", r"\.body\.(Author|Comment)"),
        (r"built: removed", r"\.body"),
        (r"build cache pruned", r"\.body\.(CachesDeleted|SpaceReclaimed)"),
    ),
    *named(
        "newer Docker labels volumes without a name",
        (r"(volume without a name|volumes? .*|df)", r"\.body.*\.Labels.*"),
    ),
    *named(
        "lists without members are lists",
        (r"(images filtered \d+|df)", r"\.body.*\.RepoDigests"),
        (r"df( empty)?", r"\.body\.BuildCache"),
    ),
    # ---- networks -------------------------------------------------------------------------
    *named(
        "the default network's bridge has a name of hutch's, and its gateway is told",
        (r"network bridge", r"\.body\.(IPAM\.Config\[\]\.Gateway|Options\..*bridge\.name)"),
    ),
)
