"""The commands of docs/lerobot.md, as real processes without network, at a size for tests."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies import make_pre_post_processors
from lerobot.policies.utils import prepare_observation_for_inference
from safetensors.torch import load_file

from lerobot_policy_tandem import export
from lerobot_policy_tandem.modeling_tandem import TandemPolicy
from robot import record, registry
from robot.eval_config import EvalConfig
from robot.evaluate import evaluate
from vla import config

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TRAINED = "outputs/lerobot/checkpoints/last/pretrained_model"
pytestmark = [pytest.mark.sim, pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = {  # what makes a command of the page small enough; the last word counts
    "lerobot-train": [
        "--policy.overrides=[%s]" % ", ".join(  # noqa: UP031 (JSON inside)
            f'"{s}"' for s in ("backbone.tiny.width=16", "backbone.tiny.mlp=16", "expert.width=16", "expert.mlp=16")
        ),
        "--steps=20", "--save_freq=10", "--batch_size=4", "--num_workers=0", "--log_freq=10", "--env_eval_freq=0",
    ],
    "resume": [],
    "lerobot-eval": ["--env.step_limit=6", "--eval.n_episodes=2", "--seed=5"],
    "lerobot-rollout": [
        "--duration=6", "--fps=5", "--return_to_initial_position=false", "--play_sounds=false",
        "--robot.discover_packages_path=lerobot_robot_simulated", "--robot.type=simulated",
        "--robot.task=drawer-close-v3", "--robot.log=sent.jsonl",
    ],
}  # fmt: skip


def of_page(name: str) -> list[str]:
    """The command of the page with this name; "resume" is the second lerobot-train."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/lerobot.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line) for line in "\n".join(blocks).replace("\\\n", " ").splitlines()]
    program, place = ("lerobot-train", 1) if name == "resume" else (name, 0)
    words = [w for w in lines if w[:1] == [program]][place]
    flags = {flag.split("=")[0] for flag in SMALL.get(name, [])}
    return [w for w in words if w.split("=")[0] not in flags | {"--robot.port"}] + SMALL.get(name, [])


def run(words: list[str], cwd: Path) -> str:
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cwd / "nothing"),
        "OMP_NUM_THREADS": "1",
        "MUJOCO_GL": "egl",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/programs"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [str(BIN / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data of two tasks, and 20 steps of training on it by the page's command."""
    folder = tmp_path_factory.mktemp("lerobot_commands")
    for name in ("configs", "datasets"):
        (folder / name).symlink_to(ROOT / name)
    small = ["episodes_per_task=2", "workers=1", "robot.tasks=[drawer-close-v3,faucet-open-v3]"]
    to = f"output={folder / 'data/metaworld'}"
    record.record(config.load(record.RecordConfig, ROOT / "configs/record_metaworld.yaml", [*small, to]))
    said = run(of_page("lerobot-train"), folder)
    assert "End of training" in said
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pretrained_model/model.safetensors")


def test_resuming_repeats_what_an_uninterrupted_run_does(work: Path) -> None:
    whole, halved = work / "outputs/lerobot", work / "resumed/outputs/lerobot"
    shutil.copytree(whole / "checkpoints/000010", halved / "checkpoints/000010")
    (halved / "checkpoints/last").symlink_to("000010")
    for name in ("configs", "datasets", "data"):
        (work / "resumed" / name).symlink_to(work / name)
    said = run(of_page("resume"), work / "resumed")
    assert "Resuming data order at epoch 0, sample 40" in said
    before = weights(whole / "checkpoints/000010")
    ended, again = (weights(place / "checkpoints/000020") for place in (whole, halved))
    assert all(torch.equal(again[name], value) for name, value in ended.items())
    assert any(not torch.equal(before[name], value) for name, value in ended.items())
    name = "training_state/optimizer_state.safetensors"
    ended, again = (load_file(place / "checkpoints/000020" / name) for place in (whole, halved))
    assert all(torch.equal(again[key], value) for key, value in ended.items())


def test_both_evaluations_see_the_same_episodes(work: Path) -> None:
    run(of_page("lerobot-eval"), work)
    info = json.loads((work / "outputs/lerobot_eval/eval_info.json").read_text())
    assert [task["task_group"] for task in info["per_task"]] == ["metaworld", "metaworld"]
    theirs = [task["metrics"]["successes"] for task in info["per_task"]]
    words = of_page("vla-eval")
    small = ["robot.tasks=[drawer-close-v3,faucet-open-v3]", "robot.step_limit=6", "episodes=2", "first_seed=5"]
    small += ["workers=1", "films={failures: 0, successes: 0}", f"output={work / 'ours'}"]
    small += [f"policy.path={work / TRAINED}"]
    asked: Any = config.load(EvalConfig, ROOT / words[1], small)
    summary = evaluate(asked)
    assert summary["errors"] == 0
    rows = [json.loads(line) for line in (work / "ours/results.jsonl").read_text().splitlines()]
    ours = [[row["success"] for row in rows if row["task"] == task] for task in asked.robot.tasks]
    assert ours == theirs


def in_process(work: Path, count: int) -> np.ndarray:
    """The first actions of LeRobot's own loop on the same robot."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies import make_pre_post_processors

    from lerobot_policy_tandem.modeling_tandem import TandemPolicy

    made: Any = PreTrainedConfig.from_pretrained(work / TRAINED)
    policy = TandemPolicy.from_pretrained(work / TRAINED, config=made)
    pre, post = make_pre_post_processors(made, pretrained_path=str(work / TRAINED))
    robot = registry.make_robot(registry.MetaWorldConfig("metaworld", ("drawer-close-v3",), 96, 240, 75))
    robot.reset("drawer-close-v3", 0)
    sent = []
    for _ in range(count):
        seen = robot.observe()
        raw = {"observation.state": np.array(seen.state), "observation.images.front": np.array(seen.images["front"])}
        ready = prepare_observation_for_inference(raw, torch.device("cpu"), "close the drawer")
        sent.append(post(policy.select_action(pre(ready)))[0].numpy())
        robot.command(sent[-1])
    robot.close()
    return np.array(sent)


@pytest.mark.parametrize("kind", ["sync", "rtc"])
def test_rollout_drives_a_robot(kind: str, work: Path) -> None:
    (work / "sent.jsonl").unlink(missing_ok=True)
    words = [w for w in of_page("lerobot-rollout") if kind == "rtc" or not w.startswith("--inference")]
    said = run([*words, f"--robot.log={work / 'sent.jsonl'}"], work)
    assert "RTC inference error" not in said
    sent = np.array([json.loads(line) for line in (work / "sent.jsonl").read_text().splitlines()])
    assert len(sent) >= 2, said
    assert np.isfinite(sent).all()
    if kind == "sync":  # the flow head decodes from its mean: nothing is drawn
        np.testing.assert_array_equal(sent, in_process(work, len(sent)))


def test_a_policy_of_vla_train_opens_after_export(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = work / TRAINED
    ours = work / "outputs/sft_metaworld/checkpoints/00000020/policy"
    shutil.copytree(whole.resolve(), ours)
    for name in [*ours.glob("policy_*"), ours / "config.json", ours / "train_config.json"]:
        name.unlink()
    (ours.parents[1] / "last").write_text("00000020\n")
    monkeypatch.chdir(work)
    assert of_page("python")[:3] == ["python", "-m", "lerobot_policy_tandem.export"]
    assert export.main(of_page("python")[3:]) == 0
    folder = work / "outputs/for_lerobot"
    made: Any = PreTrainedConfig.from_pretrained(folder)
    policies = [TandemPolicy.from_pretrained(place) for place in (folder, whole)]
    assert all(torch.equal(value, policies[1].state_dict()[name]) for name, value in policies[0].state_dict().items())
    assert made.image_features.keys() == {"observation.images.front"}
    pre, post = make_pre_post_processors(made, pretrained_path=str(folder))
    raw = {"observation.state": torch.zeros(4), "observation.images.front": torch.rand(3, 96, 96), "task": "close"}
    assert post(policies[0].select_action(pre(raw))).shape == (1, 4)
    assert export.main([str(folder), "elsewhere", "--camera", "wrist=observation.images.wrist"]) == 2
    assert "The policy has no camera 'wrist'" in capsys.readouterr().err
    assert export.main([str(work), "elsewhere"]) == 1
    assert not Path("elsewhere").exists()
