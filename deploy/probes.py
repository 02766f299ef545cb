"""Questions to the machine that may crash, hang or load half a gigabyte: each asked in a process of its own."""

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Each prints one line, or fails with the reason as the last line of its error output.
EGL = """
import os
os.environ["MUJOCO_GL"] = "egl"
import mujoco
context = mujoco.GLContext(16, 16)
context.make_current()
from OpenGL import GL
print(GL.glGetString(GL.GL_RENDERER).decode(), "OpenGL", GL.glGetString(GL.GL_VERSION).decode(), sep=", ")
context.free()
"""

CUDA = """
import importlib.util
if importlib.util.find_spec("torch"):
    import warnings
    warnings.simplefilter("ignore")
    import torch
    names = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        torch.zeros(1, device=f"cuda:{i}").add_(1).item()
        names.append(f"{p.name} ({p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor})")
    if names:
        print("; ".join(names) + f", CUDA {torch.version.cuda}")
"""

SCHED_FIFO = """
import os, resource
limit = resource.getrlimit(resource.RLIMIT_RTPRIO)[0]
try:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
except PermissionError:
    raise SystemExit(f"not permitted (RLIMIT_RTPRIO is {limit})")
print("permitted, priority 50")
"""

TORCHCODEC = """
import importlib.metadata
from torchcodec.decoders import VideoDecoder
print(importlib.metadata.version("torchcodec"))
"""

# LeRobot only logs a plugin that fails, and then knows no policy of that name: this fails aloud.
LEROBOT_PLUGIN = """
import importlib.metadata, warnings
warnings.simplefilter("ignore")
found = importlib.metadata.distribution("lerobot_policy_tandem")
name = found.metadata["Name"]
if not name.startswith("lerobot_policy_"):
    raise SystemExit(f"installed as {name!r}, which LeRobot does not look for")
import lerobot_policy_tandem
from lerobot.configs import PreTrainedConfig
from lerobot.envs import EnvConfig
assert "tandem" in PreTrainedConfig.get_known_choices() and "tandem" in EnvConfig.get_known_choices()
print(found.version)
"""


@dataclass(frozen=True)
class Outcome:
    text: str  # the probe's output
    error: str  # why it failed, in one line; "" if it did not


def run(code: str, timeout_s: float = 60.0) -> Outcome:
    """What `code` prints in a fresh interpreter; a crash or a hang becomes an `Outcome` with an error."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome("", f"no answer within {timeout_s:.0f} s")
    if done.returncode < 0:
        return Outcome("", f"crashed with {signal.Signals(-done.returncode).name}")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return Outcome("", lines[-1] if lines else f"exit code {done.returncode}")
    return Outcome(done.stdout.strip(), "")


def memory_gib() -> float:
    """Memory this process may still use: the machine's, or its container's if that is less."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return max(available, 0) / 2**30
