"""The shape of the repository, checked: who imports whom, one home per heavy dependency, no code in datasets/."""

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES, MAX_TEST_LINES = 300, 500

MAY_IMPORT = {  # package -> the packages of ours it may import, besides itself
    "vla": set(),
    "robot": {"vla"},
    "train": {"vla", "robot"},
    "deploy": {"vla", "robot"},  # never train: a robot's computer has no training stack
    "bench": {"vla", "robot", "train"},
}

TORCH_FREE = {  # the files of vla that the control side may import
    "vla.backbone_config",
    "vla.cli",
    "vla.codec",
    "vla.config",
    "vla.errors",
    "vla.files",
    "vla.head_config",
    "vla.images",
    "vla.lerobot_config",
    "vla.load",
    "vla.policy_config",
    "vla.processor",
    "vla.rotations",
    "vla.stats",
    "vla.switching",
    "vla.switching_policy",
    "vla.tokenizer",
    "vla.types",
}

# What the control computer has: the base dependencies of pyproject.toml, by import name.
BASE = {"numpy", "yaml", "rich", "scipy", "cv2", "msgpack"}

# Heavy or fragile dependency -> the only files that may import it, inside functions too.
# More than one home needs its reason here.
ONLY_HERE = {
    # Writes data sets, and is what the benchmarks compare with. Reading is our own (train/lerobot_folder.py).
    # And runs LeRobot's own policies.
    "lerobot": {"robot/dataset_writer.py", "bench/bench_data.py", "bench/bench_engine.py", "vla/lerobot_policy.py"},
    "pyarrow": {"train/lerobot_folder.py", "train/stored_images.py"},  # a data set's tables, its images in them
    # One writes films, one reads data sets, one silences the encoder that LeRobot drives.
    "av": {"robot/film.py", "train/video.py", "robot/dataset_writer.py"},
    # Each resolves a hub id that the user wrote: of a data set, of a backbone.
    "huggingface_hub": {"train/lerobot_folder.py", "vla/backbones/build.py"},
    # The VLMs: how each is run, what they share, where their weights come from.
    "transformers": {f"vla/backbones/{name}.py" for name in ("attention", "smolvlm", "paligemma", "qwen_vl", "build")},
    "tokenizers": {"vla/tokenizer.py", "vla/action_tokens/fast.py"},  # of instructions; FAST's byte-pair encoding
    # The policy, the optimizer beside it, an action tokenizer; the error of damaged weights of others; their weights.
    "safetensors": {
        "vla/checkpoint.py",
        "deploy/convert_source.py",
        "train/training_state.py",
        "vla/backbones/build.py",
        "vla/lerobot_policy.py",
        "vla/action_tokens/residual_vq.py",
        "vla/lora.py",  # adapters alone
    },
    "accelerate": {"train/distributed.py"},
    "diffusers": set(),
    "peft": {"vla/lora.py"},
    "metaworld": {"robot/sims/metaworld.py"},
    "mujoco": {"robot/sims/offscreen.py"},
    "gymnasium": set(),
    "matplotlib": {"train/inspect_data.py", "train/report_plots.py"},  # a data set's picture, a report's figures
    "jinja2": {"train/report.py"},
    "wandb": {"train/metrics.py"},
    "trackio": {"train/metrics.py"},
    "tensorboard": set(),  # train/metrics.py goes through torch.utils.tensorboard
    "pandas": set(),
    "torchcodec": {"bench/bench_data.py"},  # what LeRobot decodes with
    "rclpy": set(),
    "cyclonedds": set(),
    "pyrealsense2": set(),
    # Never: code execution on load, or (`datasets`) a name that our own folder of recipes shadows.
    "pickle": set(),
    "dill": set(),
    "cloudpickle": set(),
    "shelve": set(),
    "marshal": set(),
    "joblib": set(),
    "datasets": set(),
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


FILES = sorted(p for name in MAY_IMPORT for p in (ROOT / name).rglob("*.py"))
CONTROL_SIDE = sorted(
    {*(ROOT / "robot").rglob("*.py"), ROOT / "deploy/doctor.py"}
    | {ROOT / (name.replace(".", "/") + ".py") for name in TORCH_FREE}
)


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module imported below `tree`, as `a.b` for `import a.b`, `from a.b import c` and `from a import b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def module_name(path: Path) -> str:
    return relative(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def python(code: str, cwd: Path) -> str:
    """What a fresh interpreter prints when started elsewhere, as console scripts are."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_one_way(path: Path) -> None:
    package = relative(path).split("/")[0]
    names = set(imports(parse(path)))
    strangers = ({n.split(".")[0] for n in names} & MAY_IMPORT.keys()) - {package} - MAY_IMPORT[package]
    assert not strangers, f"{relative(path)} may not import {sorted(strangers)}"
    assert "tests" not in {n.split(".")[0] for n in names}, f"{relative(path)} may not import from tests"


@pytest.mark.parametrize("path", sorted((ROOT / "robot").rglob("*.py")), ids=relative)
def test_robot_imports_only_what_has_no_torch(path: Path) -> None:
    modules = {n for n in imports(parse(path)) if n.startswith("vla.") and is_module(n)}
    assert modules <= TORCH_FREE, f"{relative(path)} may not import {sorted(modules - TORCH_FREE)}"


def is_module(name: str) -> bool:
    stem = ROOT / name.replace(".", "/")
    return stem.with_suffix(".py").exists() or (stem / "__init__.py").exists()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_heavy_dependencies_have_one_home(path: Path) -> None:
    names = {n.split(".")[0] for n in imports(parse(path))}
    for dependency in sorted(names & ONLY_HERE.keys()):
        homes = ONLY_HERE[dependency]
        assert relative(path) in homes, f"{relative(path)} may not import {dependency}; {sorted(homes)} may"


def test_every_home_exists_and_is_lived_in() -> None:
    for dependency, homes in ONLY_HERE.items():
        for home in homes:
            found = (ROOT / home).exists() and dependency in {n.split(".")[0] for n in imports(parse(ROOT / home))}
            assert found, f"{home} is a home of {dependency} but does not import it: remove it from the table"


@pytest.mark.parametrize("path", CONTROL_SIDE, ids=relative)
def test_control_side_needs_only_the_base_dependencies_at_import(path: Path) -> None:
    if "sims" in path.parts:
        pytest.skip("a simulator needs its simulator")
    tree = parse(path)
    later = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) or is_for_types_only(n)]
    inside = {id(n) for block in later for n in ast.walk(block)}
    at_import = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) and id(n) not in inside]
    names = {n.split(".")[0] for node in at_import for n in imports(node)}
    strangers = names - sys.stdlib_module_names - BASE - MAY_IMPORT.keys() - {"__future__"}
    assert not strangers, f"{relative(path)} imports {sorted(strangers)} when it is imported; do so inside a function"


def test_base_dependencies_are_those_of_pyproject() -> None:
    distribution = {"yaml": "pyyaml", "cv2": "opencv-python-headless"}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {distribution.get(n, n) for n in BASE} == {d.split(">")[0].split("=")[0].strip() for d in listed}


def test_control_side_imports_without_torch(tmp_path: Path) -> None:
    names = [module_name(p) for p in CONTROL_SIDE]
    code = f"""
import importlib, json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "tokenizers", "lerobot", "accelerate", "safetensors"):
            raise ImportError(f"{{name}} is not there")
sys.meta_path.insert(0, Refuse())
failed = {{}}
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = str(error)
print(json.dumps(failed))
"""
    failed = json.loads(python(code, tmp_path))
    assert not failed, f"these must import without torch: {failed}"


@pytest.mark.parametrize("name", ["vla", "robot", "train", "deploy"])
def test_our_packages_are_ours(name: str, tmp_path: Path) -> None:
    found = python(f"import {name}; print({name}.__file__)", tmp_path)
    assert ROOT in Path(found).parents, f"{name} was found at {found}: another distribution owns that name"


def test_datasets_and_configs_hold_no_code() -> None:
    code = [relative(p) for name in ("datasets", "configs") for p in (ROOT / name).rglob("*.py")]
    assert not code, f"{code}: a Python file here would shadow the library that LeRobot imports"


def test_files_are_short() -> None:
    code = [*FILES, *(ROOT / "plugins").rglob("*.py")]
    limits = dict.fromkeys(code, MAX_LINES) | dict.fromkeys((ROOT / "tests").rglob("*.py"), MAX_TEST_LINES)
    lines = {relative(p): len(p.read_text(encoding="utf-8").splitlines()) for p in limits}
    long = {relative(p): lines[relative(p)] for p, limit in limits.items() if lines[relative(p)] > limit}
    assert not long, f"longer than {MAX_LINES} lines (tests: {MAX_TEST_LINES}): {long}"


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=relative)
def test_packages_start_empty(path: Path) -> None:
    body = parse(path).body
    assert all(isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in body), (
        f"{relative(path)} must be empty or a docstring: an import here is an import for everybody"
    )


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_is_loaded_that_can_run_code(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.Call):
            continue
        said = {k.arg: ast.unparse(k.value) for k in node.keywords}
        where = f"{relative(path)}:{node.lineno}"
        assert said.get("weights_only") != "False", f"{where}: weights_only=False runs code from the file"
        assert said.get("allow_pickle") != "True", f"{where}: allow_pickle=True runs code from the file"
        assert said.get("trust_remote_code") != "True", f"{where}: trust_remote_code=True runs code from a hub"
        if ast.unparse(node.func).endswith("load_state_dict"):
            assert said.get("strict") != "False", f"{where}: strict=False hides missing weights"
        if ast.unparse(node.func) == "torch.load":
            assert said.get("weights_only") == "True", f"{where}: torch.load needs weights_only=True"


@pytest.mark.parametrize("path", CONTROL_SIDE, ids=relative)
def test_control_side_parses_on_the_simulators_python(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
