"""A disk as clouds have them, made of Debian's packages: GRUB, Linux, systemd, cloud-init, sshd.

It takes a minute, so it is made once and kept under `build/`, by the digest of this file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from hutch.linux.locks import lock_file
from tests.vm.bootdisks import grub_disk, run

CACHE = Path(__file__).resolve().parents[2] / "build"
_PACKAGES = (
    *("linux-image-cloud-amd64", "systemd-sysv", "udev", "dbus", "iproute2", "cloud-init"),
    *("openssh-server", "cloud-guest-utils", "fdisk", "e2fsprogs", "util-linux"),
)
_SIZE = 1 << 30
_MAKE_S = 900.0
_COMMAND_LINE = (
    "root=LABEL=root rw console=ttyS0 quiet panic=-1 mitigations=off no_timer_check tsc=reliable "
    "random.trust_cpu=on cryptomgr.notests init_on_alloc=0 apparmor=0 audit=0"
)
# Fewer modules than by default, and one kind of host key: each is seconds under emulation.
_CLOUD = """datasource_list: [NoCloud]
ssh_genkeytypes: [ed25519]
cloud_init_modules:
  [bootcmd, write-files, growpart, resizefs, set_hostname, update_hostname, users-groups, ssh]
cloud_config_modules: [runcmd]
cloud_final_modules: [scripts-user, final-message]
system_info: {network: {renderers: [networkd]}}
"""
_MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer"),
    *("e2scrub_all.timer", "e2scrub_reap.service", "getty@tty1.service", "console-setup.service"),
    *("systemd-networkd-wait-online.service", "systemd-pstore.service", "keyboard-setup.service"),
)
_SETUP = """set -eu
cd "$1"
cp "$2/cloud.cfg" etc/cloud/cloud.cfg.d/90_test.cfg
echo 'LABEL=root / ext4 defaults 0 1' >etc/fstab
: >etc/machine-id
rm -f etc/ssh/ssh_host_*
for unit in $3; do ln -sf /dev/null "etc/systemd/system/$unit"; done
ln -sf /lib/systemd/system/systemd-networkd.service etc/systemd/system/multi-user.target.wants/
rm -rf usr/share/doc usr/share/man usr/share/locale var/cache/apt var/lib/apt/lists
"""
_INITRAMFS = """set -eu
mkdir -p "$1/etc/initramfs-tools/conf.d"
echo MODULES=list >"$1/etc/initramfs-tools/conf.d/test"
printf 'virtio_pci\\nvirtio_blk\\next4\\n' >"$1/etc/initramfs-tools/modules"
"""


def cloud_disk() -> Path:
    """Return the disk, raw and never written to; made where there is none yet."""
    name = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    disk = CACHE / f"cloud-{name}.raw"
    CACHE.mkdir(exist_ok=True)
    with lock_file(CACHE / ".cloud.lock", timeout_s=_MAKE_S):
        if not disk.exists():
            for old in CACHE.glob("cloud-*.raw"):
                old.unlink()
            with tempfile.TemporaryDirectory(dir=CACHE, prefix="cloud-") as work:
                _make(Path(work))
                os.rename(f"{work}/disk", disk)
    return disk


def _make(work: Path) -> None:
    (work / "cloud.cfg").write_text(_CLOUD)
    (work / "setup").write_text(_SETUP)
    (work / "initramfs").write_text(_INITRAMFS)
    run(
        *("mmdebstrap", "--variant=minbase", "--mode=root", "--format=directory"),
        *(f"--include={','.join(_PACKAGES)}", "--skip=check/empty"),
        '--aptopt=APT::Install-Recommends "false"',
        f'--essential-hook=sh {work}/initramfs "$1"',
        f'--customize-hook=sh {work}/setup "$1" {work} "{" ".join(_MASKED)}"',
        *("bookworm", work / "root"),
    )
    root = work / "root"
    grub_disk(work / "disk", root, size=_SIZE, command_line=_COMMAND_LINE)
    shutil.rmtree(root)
