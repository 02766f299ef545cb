"""Report what this machine can do, and for what it cannot: what that disables and the command that mends it.

Looks at versions, who owns cv2, rendering, GPU, real-time scheduling, ROS 2, video, cameras, disk, memory
and cores. Changes nothing. Exit code 0 if the main job (record, train, evaluate in simulation) can run here,
else 1.
"""

import getpass
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy import probes
from vla import cli

State = Literal["ok", "note", "missing", "broken"]
COLOURS: dict[State, str] = {"ok": "green", "note": "yellow", "missing": "yellow", "broken": "red"}

ROOT = Path(__file__).parents[1]
PRIVATE_UV = ROOT / ".uv/bin/uv"  # put there by scripts/setup if the machine had none
UV = str(PRIVATE_UV) if PRIVATE_UV.exists() and not shutil.which("uv") else "uv"
ROS_LOST = "robots behind ROS 2 (support is to come)"
EGL = "apt-get update && apt-get install -y --no-install-recommends libegl1 libegl-mesa0 libgl1-mesa-dri"
NEEDS_MEMORY_GIB, NEEDS_DISK_GIB = 6.0, 2.0  # of the main job


@dataclass(frozen=True)
class Finding:
    name: str
    state: State
    found: str  # what is there
    disables: str = ""  # what cannot be done because of it
    get: str = ""  # the exact command that mends it
    needed: bool = False  # by the main job: unless "ok" or "note", the exit code is 1

    @property
    def stops_main_job(self) -> bool:
        return self.needed and self.state in ("missing", "broken")


@dataclass(frozen=True)
class Package:
    name: str  # distribution
    extra: str  # extra of tandem-vla that installs it; "" for the base
    disables: str
    needed: bool = False

    @property
    def get(self) -> str:
        return f"{UV} sync --inexact --extra {self.extra}" if self.extra else "bash scripts/setup"


PACKAGES = (
    Package("numpy", "", "everything", needed=True),
    Package("scipy", "", "intervals and tests of evaluations", needed=True),
    Package("rich", "", "progress and tables", needed=True),
    Package("torch", "policy", "training and every learned policy", needed=True),
    Package("transformers", "policy", "the vision-language backbones", needed=True),
    Package("lerobot", "train", "reading and recording data sets", needed=True),
    Package("accelerate", "train", "vla-train", needed=True),
    Package("av", "train", "reading videos and filming evaluations", needed=True),
    Package("matplotlib", "train", "figures of vla-data and vla-report", needed=True),
    Package("metaworld", "metaworld", "the Meta-World simulator, vla-quickstart", needed=True),
    Package("mujoco", "metaworld", "the Meta-World simulator, vla-quickstart", needed=True),
    Package("tensorboard", "tensorboard", "logging to TensorBoard"),
    Package("trackio", "trackio", "logging to trackio"),
    Package("wandb", "wandb", "logging to Weights & Biases"),
)


def check_python() -> Iterator[Finding]:
    right = sys.version_info[:2] == (3, 12)
    yield Finding(
        "Python",
        "ok" if right else "broken",
        f"{platform.python_version()} on {platform.platform(terse=True)}",
        "" if right else "the packages that were tested together need 3.12",
        "" if right else "bash scripts/setup",
        needed=True,
    )


def check_packages() -> Iterator[Finding]:
    for package in PACKAGES:
        try:
            yield Finding(package.name, "ok", metadata.version(package.name), needed=package.needed)
        except metadata.PackageNotFoundError:
            yield Finding(
                package.name, "missing", "not installed", package.disables, package.get, needed=package.needed
            )


def check_own_packages() -> Iterator[Finding]:
    """Our import names are plain words; another distribution (Robot Framework) may own one."""
    for name in ("vla", "robot", "train"):
        spec = util.find_spec(name)
        if spec is None and name == "train":
            continue  # a robot's computer has no training stack
        if spec is None or spec.origin is None or ROOT not in Path(spec.origin).parents:
            yield Finding(
                f"package {name!r}",
                "broken",
                f"found at {spec.origin if spec else 'no place'}, not below {ROOT}",
                f"every command that imports {name!r}",
                f"{UV} pip uninstall robotframework && bash scripts/setup",
                needed=True,
            )


def check_cv2() -> Iterator[Finding]:
    mend = f"{UV} pip uninstall opencv-python opencv-contrib-python opencv-python-headless; bash scripts/setup"
    owners = cv2_owners()
    if len(owners) == 1:
        yield Finding("cv2", "ok", f"owned by {owners[0]}", needed=True)
    elif owners:
        text = f"two owners: {', '.join(owners)}; the last one installed wins, removing one breaks both"
        yield Finding("cv2", "broken", text, "image resizing may fail or differ", mend, needed=True)
    else:
        yield Finding("cv2", "missing", "no distribution owns it", "all work with images", mend, needed=True)


def cv2_owners() -> list[str]:
    """Distributions that install files below cv2/, with versions."""
    return sorted(
        f"{d.metadata['Name']} {d.version}"
        for d in metadata.distributions()
        if d.metadata["Name"].startswith("opencv") and any(f.parts[0] == "cv2" for f in d.files or ())
    )


def check_rendering() -> Iterator[Finding]:
    outcome = probes.run(probes.EGL)
    prefix = "" if os.geteuid() == 0 else "sudo "
    if outcome.error:
        text, lost = f"no EGL context: {outcome.error}", "every simulator, vla-quickstart"
        absent = outcome.error.startswith("ModuleNotFoundError")
        get = f"{UV} sync --inexact --extra metaworld" if absent else EGL.replace("apt-get", f"{prefix}apt-get")
        yield Finding("rendering (EGL)", "broken", text, lost, get, needed=True)
        return
    slow = "llvmpipe" in outcome.text or "softpipe" in outcome.text
    yield Finding("rendering (EGL)", "ok", outcome.text + (", on the CPU" if slow else ""), needed=True)


def check_gpu() -> Iterator[Finding]:
    outcome = probes.run(probes.CUDA)
    driver = shutil.which("nvidia-smi")
    if outcome.error:
        yield Finding("GPU", "broken", outcome.error, "training on the GPU", "nvidia-smi")
    elif outcome.text:
        yield Finding("GPU", "ok", outcome.text)
    elif driver:
        text = "nvidia-smi is installed, but torch sees no device"
        yield Finding("GPU", "broken", text, "training on the GPU", f"nvidia-smi; {UV} pip install --reinstall torch")
    else:
        text = "none; everything runs on the CPU"
        yield Finding("GPU", "note", text, "fine-tuning of backbones beyond the small default in useful time")


def check_realtime() -> Iterator[Finding]:
    outcome = probes.run(probes.SCHED_FIFO)
    if not outcome.error:
        yield Finding("SCHED_FIFO", "ok", outcome.text)
        return
    user = getpass.getuser()
    get = (
        f"echo '{user} - rtprio 90' | sudo tee /etc/security/limits.d/99-tandem.conf   # then log in again; "
        "in a container: --cap-add SYS_NICE --ulimit rtprio=90"
    )
    yield Finding("SCHED_FIFO", "missing", outcome.error, "a control loop that other programs cannot delay", get)


def check_ros() -> Iterator[Finding]:
    distribution = os.environ.get("ROS_DISTRO", "")
    if util.find_spec("rclpy") is not None:
        yield Finding("ROS 2", "ok", f"rclpy, {distribution or 'ROS_DISTRO is not set'}")
        return
    installed = sorted(p.name for p in Path("/opt/ros").glob("*")) if Path("/opt/ros").is_dir() else []
    if installed:
        text = f"{', '.join(installed)} in /opt/ros, but not visible to this Python (Jazzy has Python 3.12)"
        yield Finding("ROS 2", "missing", text, ROS_LOST, f"source /opt/ros/{installed[0]}/setup.bash")
    else:
        get = "sudo apt-get install ros-jazzy-ros-base   # Ubuntu 24.04 with the ROS 2 apt source"
        yield Finding("ROS 2", "missing", "not installed", ROS_LOST, get)


def check_video() -> Iterator[Finding]:
    outcome = probes.run(probes.TORCHCODEC)
    if outcome.error:
        text = f"does not load ({outcome.error})"
        yield Finding("torchcodec", "note", text, "nothing: videos are decoded with PyAV", "apt-get install ffmpeg")
    else:
        yield Finding("torchcodec", "ok", outcome.text)
    ffmpeg = shutil.which("ffmpeg")
    lost = "" if ffmpeg else "nothing: PyAV brings its own libraries"
    yield Finding("ffmpeg", "ok" if ffmpeg else "note", ffmpeg or "not installed", lost)


def check_realsense() -> Iterator[Finding]:
    if util.find_spec("pyrealsense2"):
        yield Finding("RealSense", "ok", f"pyrealsense2 {metadata.version('pyrealsense2')}")
    else:
        get = f"{UV} pip install 'pyrealsense2<2.57'"
        yield Finding(
            "RealSense", "missing", "pyrealsense2 is not installed", "RealSense cameras (support is to come)", get
        )


def check_lerobot_plugin() -> Iterator[Finding]:
    name, outcome = "lerobot_policy_tandem", probes.run(probes.LEROBOT_PLUGIN)
    if not outcome.error:
        yield Finding(name, "ok", outcome.text)
        return
    absent = outcome.error.startswith(("importlib.metadata.PackageNotFoundError", "ModuleNotFoundError"))
    text = "not installed" if absent else f"does not import: {outcome.error}"
    lost = "our policy under LeRobot's own commands (docs/lerobot.md)"
    yield Finding(name, "missing" if absent else "broken", text, lost, "bash scripts/setup")


def check_resources() -> Iterator[Finding]:
    memory = probes.memory_gib()
    short = memory < NEEDS_MEMORY_GIB
    lost = f"vla-quickstart may run out of memory (wants {NEEDS_MEMORY_GIB:.0f} GiB)" if short else ""
    yield Finding("memory", "note" if short else "ok", f"{memory:.1f} GiB available", lost)
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    full = free < NEEDS_DISK_GIB
    lost = f"recording and checkpoints (the main job wants {NEEDS_DISK_GIB:.0f} GiB)" if full else ""
    get = "give an output folder on another disk: vla-quickstart --out FOLDER" if full else ""
    state: State = "broken" if full else "ok"
    yield Finding("disk", state, f"{free:.0f} GiB free at {Path.cwd()}", lost, get, needed=True)
    yield Finding("CPU cores", "ok", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_own_packages,
    check_packages,
    check_cv2,
    check_rendering,
    check_gpu,
    check_realtime,
    check_video,
    check_lerobot_plugin,
    check_realsense,
    check_ros,
    check_resources,
)


def examine(checks: Sequence[Callable[[], Iterator[Finding]]] = CHECKS) -> list[Finding]:
    """All findings in the order of `checks`; the probes run side by side in processes of their own."""
    with ThreadPoolExecutor(4) as pool:
        return [finding for found in pool.map(lambda check: list(check()), checks) for finding in found]


def show(findings: Sequence[Finding], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "found"):
        table.add_column(heading, overflow="fold")
    for f in findings:
        table.add_row(Text(f.state, COLOURS[f.state]), f.name, Text(f.found))
    console.print(table)
    absent = [f for f in findings if f.disables]
    if absent:
        console.print("\nWhat is missing, what that disables, how to get it:", style="bold")
    for f in absent:
        console.print(Text.assemble((f"\n{f.name}", COLOURS[f.state]), f": {f.disables}"), soft_wrap=True)
        if f.get:
            console.print(Text(f"    {f.get}"), soft_wrap=True)
    stopped = [f.name for f in findings if f.stops_main_job]
    verdict = f"The main job cannot run: {', '.join(stopped)}." if stopped else "The main job can run: vla-quickstart"
    console.print(f"\n{verdict}", style="bold")


def main(argv: Sequence[str] | None = None) -> int:
    p = cli.parser(__doc__)
    p.add_argument("--json", action="store_true", help="print the findings as JSON, for bug reports and scripts")
    args = p.parse_args(argv)
    findings = examine()
    ready = not any(f.stops_main_job for f in findings)
    if args.json:
        print(json.dumps({"version": 1, "ready": ready, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        show(findings, Console())
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main())
