"""`--policy.type=tandem`: our policy's settings in the form that LeRobot parses, saves and loads.

LeRobot's parser has no unions of nested dataclasses, so that the settings are one mapping, `architecture`, which
our own strict parser builds and checks. A user writes the YAML that `vla-train` takes, and dotted overrides:

    --policy.yaml=configs/sft_metaworld_flow.yaml --policy.overrides='["head.steps=10"]' --policy.execute=4

Both are taken in at once: what is saved is `architecture` alone, complete.
"""

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig
from lerobot.utils.constants import OBS_IMAGES, OBS_STATE

from train import recipe as recipes
from vla import config as settings
from vla.errors import UsageError, choose_from
from vla.policy_config import PolicyConfig
from vla.types import ActionSpec


def _identity() -> dict[str, NormalizationMode]:
    return dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)


@PreTrainedConfig.register_subclass("tandem")
@dataclass
class TandemConfig(PreTrainedConfig):
    # What a user writes; taken into the fields below and then emptied.
    yaml: str = ""  # file with the policy's settings, alone or as the block `policy`
    overrides: list[str] = field(default_factory=list)  # e.g. ["head.steps=10"]
    recipe: str = ""  # file that says what the data set's numbers mean; without, a checkpoint fits no robot of ours

    architecture: dict[str, Any] = field(default_factory=dict)  # vla.policy_config.PolicyConfig
    chunk: int | None = None  # of `architecture`, for short
    execute: int | None = None
    image_keys: dict[str, str] = field(default_factory=dict)  # the policy's camera -> LeRobot's key, from the recipe
    specs: dict[str, Any] = field(default_factory=dict)  # "state" and "action": vla.types.ActionSpec, from the recipe
    seed: int = 0  # of the random initial weights
    action_feature_names: list[str] | None = None  # filled in by LeRobot
    # The policy normalises with exact statistics of its own (see statistics.py), LeRobot's step does nothing.
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=_identity)

    optimizer_lr: float = 1e-4
    optimizer_betas: tuple[float, float] = (0.9, 0.999)
    optimizer_eps: float = 1e-8
    optimizer_weight_decay: float = 0.01  # of matrices; norms, biases and embeddings are never decayed
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 100
    scheduler_decay_steps: int = 10_000
    scheduler_decay_lr: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.yaml:
            data = settings.read(self.yaml)
            self.architecture = data["policy"] if isinstance(data.get("policy"), dict) else data
        if self.recipe:
            self._take_in(recipes.load(self.recipe))
        if self.architecture:
            data = settings.override(self.architecture, self.overrides, PolicyConfig)
            data |= {k: v for k in ("chunk", "execute") if (v := getattr(self, k)) is not None}
            self.architecture = settings.to_data(settings.build(PolicyConfig, data, self.yaml or "policy.architecture"))
            self.chunk, self.execute = self.architecture["chunk"], self.architecture["execute"]
            self.yaml, self.overrides = "", []
        if set(self.normalization_mapping.values()) - {NormalizationMode.IDENTITY}:
            raise UsageError(
                "policy.normalization_mapping must be IDENTITY: the policy normalises itself, as "
                "'normalization' in its settings says. Choose with --policy.overrides='[\"normalization=quantile\"]'."
            )

    def _take_in(self, recipe: recipes.Recipe) -> None:
        for vector, key in ((recipe.state, OBS_STATE), (recipe.action, "action")):
            if vector.key != key:
                raise UsageError(f"Recipe {self.recipe} reads {vector.key!r}; under LeRobot it can only be {key!r}.")
        self.image_keys = dict(recipe.cameras)
        self.specs = {"state": recipe.state.spec.to_json(), "action": recipe.action.spec.to_json()}
        self.recipe = ""

    @property
    def policy(self) -> PolicyConfig:
        """The settings as our own class.

        Raises:
            UsageError: none were given.
        """
        if not self.architecture:
            raise UsageError(
                "A policy of type 'tandem' needs its settings: --policy.yaml=FILE, such as "
                "configs/sft_metaworld_flow.yaml, or a trained one: --policy.path=FOLDER."
            )
        return settings.build(PolicyConfig, self.architecture, "policy.architecture")

    def image_key(self, camera: str) -> str:
        """LeRobot's name of one of the policy's cameras."""
        return self.image_keys.get(camera, f"{OBS_IMAGES}.{camera}")

    def spec(self, which: str) -> ActionSpec | None:
        """The recipe's "state" or "action", None without a recipe."""
        return ActionSpec.from_json(self.specs[which]) if which in self.specs else None

    def validate_features(self) -> None:
        """Raise `UsageError` unless the data set or environment has what the policy wants."""
        missing = [key for key in map(self.image_key, self.policy.cameras) if key not in self.image_features]
        if missing:
            raise UsageError(
                f"The policy's cameras {list(self.policy.cameras)} are {missing} under LeRobot, which are not there."
                f"{choose_from(missing[0], self.image_features)} Name them with --policy.recipe=FILE, or with "
                "--policy.overrides='[\"cameras=[top]\"]' for a key observation.images.top."
            )
        for name, feature in ((OBS_STATE, self.robot_state_feature), ("action", self.action_feature)):
            if feature is None or len(feature.shape) != 1:
                raise UsageError(f"The policy needs a vector {name!r}, the data has {feature}.")

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(-self.policy.past, self.policy.chunk))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(
            lr=self.optimizer_lr,
            betas=self.optimizer_betas,
            eps=self.optimizer_eps,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        return CosineDecayWithWarmupSchedulerConfig(
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
            peak_lr=self.optimizer_lr,
            decay_lr=self.scheduler_decay_lr,
        )
