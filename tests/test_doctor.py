import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from deploy import doctor, probes
from deploy.doctor import Finding


def run_doctor(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; modules in `path` hide installed ones, in its probes too."""
    env = os.environ | ({"PYTHONPATH": f"{path}{os.pathsep}{Path(__file__).parents[1]}"} if path else {})
    command = [sys.executable, "-m", "deploy.doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=120)


@pytest.mark.sim
def test_this_machine_runs_the_main_job() -> None:
    done = run_doctor("--json")
    report = json.loads(done.stdout)
    found = {f["name"]: f for f in report["findings"]}
    assert done.returncode == 0, done.stdout
    assert report["version"] == 1
    assert report["ready"] is True
    assert "OpenGL" in found["rendering (EGL)"]["found"]
    assert found["torch"]["found"].startswith("2.")
    assert {"SCHED_FIFO", "ROS 2", "RealSense", "GPU", "torchcodec", "memory", "disk", "CPU cores"} <= found.keys()


def test_crash_of_the_renderer_is_a_finding_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "mujoco.py").write_text("import os; os.abort()")
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so is not there')")  # and it is quick
    done = run_doctor(path=tmp_path)
    assert done.returncode == 1, done.stdout
    assert "no EGL context: crashed with SIGABRT" in " ".join(done.stdout.split())
    assert "apt-get install -y --no-install-recommends libegl1 libegl-mesa0 libgl1-mesa-dri" in done.stdout
    assert "The main job cannot run: rendering (EGL)." in done.stdout


def test_a_simulator_that_is_not_installed_is_not_blamed_on_the_graphics(tmp_path: Path) -> None:
    (tmp_path / "mujoco.py").write_text("import mujoco_is_not_here")
    (tmp_path / "torch.py").write_text("raise ImportError('slow')")
    findings = json.loads(run_doctor("--json", path=tmp_path).stdout)["findings"]
    (rendering,) = [f for f in findings if f["name"] == "rendering (EGL)"]
    assert rendering["get"].endswith("uv sync --inexact --extra metaworld")


@pytest.mark.parametrize(
    ("code", "text", "error"),
    [
        ("print('Mesa')", "Mesa", ""),
        ("raise ImportError('no libGL')", "", "ImportError: no libGL"),
        ("raise SystemExit(3)", "", "exit code 3"),
        ("import os; os.kill(os.getpid(), 11)", "", "crashed with SIGSEGV"),
    ],
)
def test_probe(code: str, text: str, error: str) -> None:
    assert probes.run(code) == probes.Outcome(text, error)


def test_probe_that_hangs_ends() -> None:
    assert probes.run("while True: pass", timeout_s=0.5).error == "no answer within 0 s"


def install(folder: Path, name: str, file: str) -> None:
    """A distribution as an installer would leave it."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"{file},,\n")
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).touch()  # a file that is recorded but not there counts for nothing


def test_second_owner_of_cv2_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(doctor.cv2_owners()) == 1
    install(tmp_path, "opencv-python", "cv2/__init__.py")
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = doctor.check_cv2()
    assert finding.state == "broken"
    assert finding.stops_main_job
    assert "opencv-python 1.0, opencv-python-headless" in finding.found
    assert "uv pip uninstall opencv-python " in finding.get


def test_distribution_without_cv2_files_owns_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "opencv-python", "elsewhere/__init__.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert len(doctor.cv2_owners()) == 1


def test_foreign_package_of_our_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "robot").mkdir()
    (tmp_path / "robot/__init__.py").write_text("")
    code = "from deploy import doctor; print(*doctor.check_own_packages(), sep='\\n')"
    path = f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert f"found at {tmp_path}" in done.stdout, done.stderr


def test_every_gap_says_what_it_disables_and_how_to_close_it() -> None:
    for package in doctor.PACKAGES:
        assert package.disables
        assert package.get.startswith(("uv ", "bash scripts/setup"))


def test_only_a_gap_in_what_the_main_job_needs_stops_it(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [
        Finding("torch", "missing", "not installed", "training", "uv sync", needed=True),
        Finding("wandb", "missing", "not installed", "logging", "uv sync --inexact --extra wandb"),
        Finding("memory", "note", "3 GiB", "comfort", needed=True),
    ]
    doctor.show(findings, Console(width=60))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "The main job cannot run: torch."
    assert "    uv sync --inexact --extra wandb" in lines  # whole, in a line of its own: ready to copy
    assert [f.name for f in findings if f.stops_main_job] == ["torch"]


@pytest.mark.parametrize(
    ("module", "name", "state", "found"),
    [
        ("", None, "missing", "not installed"),
        ("1 / 0", "lerobot_policy_tandem", "broken", "does not import: ZeroDivisionError: division by zero"),
        ("", "lerobot-policy-tandem", "broken", "installed as 'lerobot-policy-tandem', which LeRobot does not look"),
    ],
)
def test_a_plugin_that_lerobot_would_silently_leave_out_is_found(
    module: str, name: str | None, state: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{probes.LEROBOT_PLUGIN}"
    if name:
        install(tmp_path, name, "lerobot_policy_tandem.py")
        (tmp_path / "lerobot_policy_tandem.py").write_text(module)
    else:
        code = code.replace('distribution("lerobot_policy_tandem")', 'distribution("lerobot_policy_nowhere")')
    monkeypatch.setattr(probes, "LEROBOT_PLUGIN", code)
    (finding,) = doctor.check_lerobot_plugin()
    assert finding.state == state, finding
    assert found in finding.found
    assert finding.get == "bash scripts/setup"
    assert not finding.stops_main_job


@pytest.mark.slow
def test_the_plugin_is_imported_aloud() -> None:
    (finding,) = doctor.check_lerobot_plugin()
    assert (finding.state, finding.found) == ("ok", "0.1.0"), finding


def test_memory_is_plausible() -> None:
    assert 0.01 < probes.memory_gib() < 100_000
