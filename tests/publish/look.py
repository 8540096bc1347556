"""A program that was published, and says what it sees and may do, each thing as
a fact of a name."""

import contextlib
import ctypes
import json
import os
import socket
import stat
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWUSER = 0x10000000
ADDR_NO_RANDOMIZE = 0x0040000


def lists(folder: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(os.listdir(folder))
    return False


def may_make_socket(family: int) -> bool:
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_RAW):
        return True
    return False


def may_set_uid_bit() -> bool:
    file = os.path.join(os.getcwd(), "file")
    os.close(os.open(file, os.O_CREAT, 0o600))
    with contextlib.suppress(OSError):
        os.chmod(file, 0o700 | stat.S_ISUID)
        return True
    return False


def options(place: str) -> list[str]:
    """With which options the last of what is mounted there is mounted."""
    found: list[str] = []
    with open("/proc/self/mountinfo", encoding="utf-8") as lines:
        for line in lines:
            words = line.split()
            if words[4] == place:
                found = words[5].split(",")
    return found


def facts() -> dict[str, object]:
    return {
        "writes /dev": "ro" not in options("/dev"),
        "the kernel's /proc": os.path.exists("/proc/meminfo"),
        "other processes": os.path.exists("/proc/1"),
        "homes": lists("/home") or lists("/root"),
        "writes /sys": "ro" not in options("/sys"),
        "writes control groups": "ro" not in options("/sys/fs/cgroup"),
        "writes /": "ro" not in options("/"),
        "modules": lists("/usr/lib/modules"),
        "host name": os.readlink("/proc/self/ns/uts"),
        "queues and shared memory": os.readlink("/proc/self/ns/ipc"),
        "namespaces": LIBC.unshare(CLONE_NEWUSER) == 0,
        "netlink": may_make_socket(socket.AF_NETLINK),
        "set-uid": may_set_uid_bit(),
        "personality": LIBC.personality(ADDR_NO_RANDOMIZE) != -1,
        "ptrace": LIBC.ptrace(0, 0, 0, 0) == 0,
        "others' /tmp": os.path.exists("/tmp/marker")
        or os.path.exists("/var/tmp/marker"),
        "others' /dev/shm": os.path.exists("/dev/shm/marker"),
        "umask": f"{os.umask(0o077):03o}",
    }


if __name__ == "__main__":
    if sys.argv[1:]:
        # The same without a room.
        os.chdir(sys.argv[1])
        print(json.dumps(facts()))
    else:
        with socket.socket(fileno=3).accept()[0] as client:
            client.sendall(json.dumps(facts()).encode())
