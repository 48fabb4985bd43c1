"""How much host memory a process is taken to have left."""

from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from megatron_psft.distributed.host_memory import available_bytes, limit_bytes

GIB = 2**30
UNLIMITED_1 = 9223372036854771712
Group = namedtuple("Group", "limit usage cache")


def write_group(folder: Path, group: Group, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limit, usage = {1: ("limit_in_bytes", "usage_in_bytes"), 2: ("max", "current")}[version]
    (folder / f"memory.{limit}").write_text(f"{group.limit}\n")
    (folder / f"memory.{usage}").write_text(f"{group.usage}\n")
    name = {1: "total_inactive_file", 2: "inactive_file"}[version]
    (folder / "memory.stat").write_text(f"anon 17\n{name} {group.cache}\nfile 4\n")


@pytest.fixture
def host(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("Memory", "available total")(100 * GIB, 200 * GIB))
    (tmp_path / "proc" / "self").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("version", "memberships", "groups", "left", "limit"),
    [
        (
            2,
            "0::/job/step",
            {"job": Group(40 * GIB, 30 * GIB, 2 * GIB), "job/step": Group("max", GIB, 0)},
            12 * GIB,
            40 * GIB,
        ),
        (2, "0::/job/step", {"job": Group("max", GIB, 0), "job/step": Group(8 * GIB, 3 * GIB, 0)}, 5 * GIB, 8 * GIB),
        (2, "0::/", {".": Group(8 * GIB, 3 * GIB, GIB)}, 6 * GIB, 8 * GIB),
        # Of a container only the group that it is can be seen, at the mount, whatever its path outside.
        (2, "0::/kubepods/pod1/container2", {".": Group(8 * GIB, 3 * GIB, GIB)}, 6 * GIB, 8 * GIB),
        (1, "5:cpu,cpuacct:/a\n4:memory:/a\n0::/a", {"memory/a": Group(9 * GIB, 4 * GIB, GIB)}, 6 * GIB, 9 * GIB),
        (1, "4:memory:/a", {"memory/a": Group(UNLIMITED_1, 4 * GIB, GIB)}, 100 * GIB, None),
        (2, "0::/job", {"job": Group(400 * GIB, GIB, 0)}, 100 * GIB, None),
        (2, "3:cpu:/job", {"job": Group(GIB, 0, 0)}, 100 * GIB, None),
    ],
)
def test_the_narrowest_limit_of_its_groups_counts(host, version, memberships, groups, left, limit):
    (host / "proc/self/cgroup").write_text(f"{memberships}\n")
    for name, group in groups.items():
        write_group(host / "sys/fs/cgroup" / name, group, version)
    assert available_bytes(host) == left
    assert limit_bytes(host) == limit


def test_a_system_without_control_groups_has_what_is_free(host):
    assert available_bytes(host) == 100 * GIB
    assert limit_bytes(host) is None


def test_this_machine_has_memory_left():
    assert 0 < available_bytes() <= psutil.virtual_memory().total
