"""Dockerfiles whose images both daemons are to make alike: their files and their configuration."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlencode

from scripts.docker_answers import Side
from scripts.docker_tars import tar_of

__all__ = ["dockerfiles"]

_KEPT = """Env Cmd Entrypoint Labels User WorkingDir ExposedPorts Volumes Healthcheck StopSignal
OnBuild Shell""".split()
# What the daemons put into a container, not the image.
_OTHERS = re.compile(r"(dockerenv|dev|proc|sys|etc/(hosts|hostname|mtab|resolv\.conf))?(/|$)")
_FILES = {name: name.encode() * 3 for name in "a b/e b/c d1.txt d2.tyt d3.tzt s/x s/y/x".split()}
_DOCKERFILES = {
    "variables": "ARG V=1\nENV A=$V B=\"x y\" C='q $V' D=a\\ b\nENV E one two $A\n"
    'ENV PATH=$PATH:/z X=${NO:-d} Y=${A:+s} Z=${V}$$ W=\\$A\nLABEL a="x\\"y" "c d"=\'e$A\'\n'
    "ENV A=2 F=$A\nRUN echo $A-$F-$V > /vars",
    "an argument that the environment hides": "ENV A=env\nARG A=arg\nRUN echo $A > /a",
    "directories": "WORKDIR /w/a\nWORKDIR b\nRUN pwd > p\nWORKDIR ../c//d/\nCOPY a .\n"
    "RUN mkdir /real && ln -s /real /l\nWORKDIR /l/sub\nRUN pwd -P > p",
    "copies": "COPY a /x/\nCOPY a b/ /y/\nCOPY b /z\nCOPY b/. /zz/\nCOPY d*.t[xy]t /w/\n"
    'COPY ./b/../b/e /e\nCOPY --chown=5:6 b /own/er\nCOPY ["a","/sp ace"]\nADD a /add/\n'
    "COPY . /all/",
    "directories that are there": "RUN mkdir -p /t/b && chmod 700 /t/b && echo o > /t/b/e\n"
    "COPY b /t/b\nCOPY b/e /t/\nRUN mkdir /t/d && touch /t/d/f\nCOPY a /t/d",
    "links": "RUN mkdir /real && ln -s /real /link && ln -s ../../nowhere /gone && ln -s /f /g\n"
    "COPY a /link/\nCOPY b /link/sub\nCOPY a /gone/\nCOPY b/e /g",
    "stages": "RUN mkdir -p /s/d && echo 1 > /s/d/f && ln -s f /s/d/l && chmod 4755 /s/d/f && "
    "chown 3:4 /s/d && mkfifo /s/p\nFROM {image} AS two\nCOPY --from=0 /s/d /d\n"
    "COPY --from=0 /s/d/l /copy\nCOPY --from=0 /s/d/* /glob/\nCOPY --from=0 /s /s",
    "what was removed": "RUN mkdir -p /r/b && touch /r/b/c\n"
    "RUN rm -r /r && mkdir /r && touch /r/n\nRUN rm -r /r && ln -s /tmp /r",
    "volumes": "RUN mkdir /v && echo 1 > /v/a\nVOLUME /v\nCOPY a /v/c",
    "metadata": "EXPOSE 80/TCP 81 90/udp 100-102\nSTOPSIGNAL 9\nUSER u:g\n"
    'SHELL ["/bin/ash","-xc"]\nCMD echo $HOME\nENTRYPOINT top\n'
    'HEALTHCHECK --interval=5s --retries=4 CMD ["true"]\n'
    "ONBUILD RUN echo x\nLABEL a=b old=",
    "continued lines": "RUN echo a \\\n # in between\n\n  > /a\n"
    "ENV A=a\\\n  B=b \\\n\\\n C=c\n#end",
    "quotes": 'RUN echo "a\\\\b" \'c\\d\' > /q\nRUN ["sh","-c","echo $0 $1 > /z","n","o"]\n'
    'RUN  a=1;   echo   "$a   $a"   >   /sp',
}


def dockerfiles(side: Side, image: str) -> None:
    """Build each, and keep what came out."""
    kind = {"Content-Type": "application/x-tar"}
    tag = urlencode({"t": "compare:dockerfile", "networkmode": "none"})
    for name, text in _DOCKERFILES.items():
        files = {
            **_FILES,
            "Dockerfile": f"FROM {image}\n{text}\n".replace("{image}", image).encode(),
        }
        told = side.ask("", "POST", f"/build?{tag}", tar_of(files), kind)
        found = side.ask("", "GET", "/images/compare:dockerfile/json") or {}
        config = found.get("Config") or {}
        made = side.ask("", "POST", "/containers/create", {"Image": "compare:dockerfile"})
        if "Id" not in made:
            side.steps[f"dockerfile with {name}"] = {"failed": told}
            continue
        tree = side.ask("", "GET", f"/containers/{made['Id']}/archive?path=/")
        side.steps[f"dockerfile with {name}"] = {
            "config": {key: config[key] for key in _KEPT if config.get(key)},
            "files": _files(tree),
        }
        side.ask("", "DELETE", f"/containers/{made['Id']}?force=1&v=1")
        side.ask("", "DELETE", "/images/compare:dockerfile?force=1")


def _files(tree: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for entry in tree:
        name = entry.pop("name").lstrip("./")
        if not _OTHERS.match(name):
            found[name] = entry
    return found
