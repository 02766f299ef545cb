"""Make a policy that `vla-train` made open under LeRobot's commands.

    python -m lerobot_policy_tandem.export outputs/sft_metaworld/checkpoints/last outputs/for_lerobot

Copies the checkpoint and adds LeRobot's config.json and processors. Cameras are observation.images.NAME under
LeRobot, unless --camera says otherwise.
"""

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_policy_tandem.configuration_tandem import TandemConfig
from lerobot_policy_tandem.processor_tandem import make_tandem_pre_post_processors
from robot.policies import resolve
from vla import checkpoint, cli
from vla import config as settings
from vla.errors import UsageError, choose_from
from vla.files import whole_folder


def export(folder: Path, output: Path, image_keys: Mapping[str, str]) -> None:
    """Write `output`, whole or not at all: the checkpoint in `folder`, readable by LeRobot too.

    Args:
        image_keys: the policy's camera -> LeRobot's key, where it is not observation.images.NAME.

    Raises:
        CheckpointError: `folder` is no whole checkpoint of ours.
        UsageError: a camera that the policy does not have.
    """
    saved = checkpoint.read(folder)
    for name in image_keys:
        if name not in saved.config.cameras:
            raise UsageError(f"The policy has no camera {name!r}.{choose_from(name, saved.config.cameras)}")
    state, action = saved.statistics.state_spec, saved.statistics.action_spec
    config = TandemConfig(
        architecture=settings.to_data(saved.config),
        image_keys=dict(image_keys),
        specs={"state": state.to_json(), "action": action.to_json()},
        action_feature_names=list(action.names),
        device="cpu",
    )
    picture = PolicyFeature(FeatureType.VISUAL, (3, saved.config.image_size, saved.config.image_size))
    config.input_features = {config.image_key(name): picture for name in saved.config.cameras}
    config.input_features[OBS_STATE] = PolicyFeature(FeatureType.STATE, (state.dim,))
    config.output_features = {ACTION: PolicyFeature(FeatureType.ACTION, (action.dim,))}
    with whole_folder(output) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        config.save_pretrained(partial)
        for processor in make_tandem_pre_post_processors(config):
            processor.save_pretrained(partial)


def main(argv: Sequence[str] | None = None) -> int:
    p = cli.parser(__doc__)
    p.add_argument("checkpoint", help="a policy folder, or a training run's checkpoints/last")
    p.add_argument("output", type=Path, help="the folder to write")
    p.add_argument("--camera", action="append", default=[], metavar="NAME=KEY", help="top=observation.images.cam0")
    args = p.parse_args(argv)

    def body() -> None:
        pairs = [text.partition("=") for text in args.camera]
        cli.require(all(key for _, _, key in pairs), f"--camera needs NAME=KEY, got {args.camera}.")
        export(Path(resolve(args.checkpoint)), args.output, {name: key for name, _, key in pairs})
        print(f"{args.output} opens with --policy.path={args.output}")

    return cli.run(body)


if __name__ == "__main__":
    sys.exit(main())
