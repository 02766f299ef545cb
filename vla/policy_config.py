"""The policy's configuration: everything that decides its architecture. No torch.

A checkpoint carries one of these; together with its statistics, tokenizer and weights it is complete.
"""

from dataclasses import dataclass
from typing import Literal

from vla.backbone_config import BackboneConfig
from vla.codec import Normalization
from vla.errors import UsageError
from vla.head_config import DiscreteDiffusionConfig, E0Config, FlowConfig, HeadConfig
from vla.images import Bars


@dataclass(frozen=True)
class ExpertConfig:
    """The action expert: a transformer over suffix tokens that attends to the prefix cache."""

    width: int
    layers: int
    mlp: int
    attention: tuple[Literal["joint", "cross"], ...]  # repeated over the layers
    norm: Literal["rms", "adarms"]  # adarms: the head's time conditions every norm (pi0.5)
    action_attention: Literal["bidirectional", "causal"]  # pi0 and pi0.5, or SmolVLA
    activation: Literal["silu", "gelu_tanh"] = "silu"  # of the MLP's gate: SmolVLA, or Gemma (pi0 and pi0.5)
    norm_eps: float = 1e-6  # added to the mean square in every norm
    first_position: int | None = None  # rotary position of the first token after the prefix; null: how many of the
    # prefix's tokens are valid. The released mixture-of-horizons weights count the padded ones too, a fixed number

    def __post_init__(self) -> None:
        if "joint" not in self.attention:
            raise UsageError(
                f"policy.expert.attention is {self.attention}: at least one layer kind must be 'joint', since only "
                "joint layers let the actions see the state and one another."
            )
        if self.width % 2:
            raise UsageError(f"policy.expert.width must be even, got {self.width}.")


@dataclass(frozen=True)
class MixtureConfig:
    """Mixture of horizons (arXiv 2511.19433): one expert predicts chunks of several lengths, a gate mixes them."""

    horizons: tuple[int, ...]  # steps, increasing; the last is the chunk
    gate_noise: Literal["none", "learned"]  # on the gate's logits in training; learned: the released code's
    independent: float  # weight of the sum of the horizons' own losses; 1 in the paper
    balance: float  # weight of the gate's balance loss; 1e-3 in the paper
    consensus: "ConsensusConfig | None"  # null: always execute `policy.execute` steps

    def __post_init__(self) -> None:
        if not self.horizons or list(self.horizons) != sorted(set(self.horizons)) or self.horizons[0] < 1:
            raise UsageError(f"policy.mixture.horizons must be positive and increasing, got {list(self.horizons)}.")


@dataclass(frozen=True)
class ConsensusConfig:
    """How many steps to execute, from how far the horizons disagree (arXiv 2511.19433, algorithm 1)."""

    shortest: int  # steps executed in any case; 5 in the paper
    ratio: float  # executing ends where disagreement reaches this times its mean over the first steps; 1.0 to 1.4
    active: int  # ... or where fewer horizons than this still predict; 5 in the paper


@dataclass(frozen=True)
class FastSlowConfig:
    """Training for an encoding that is older than the state and the actions (DuoCore-FS)."""

    min_age: int  # control steps between encoding and state: drawn evenly from min_age..max_age
    max_age: int
    fresh_share: float  # of the samples that have age 0 instead
    frames: int  # states and chunks trained on each encoding
    cameras: tuple[str, ...]  # cameras whose newest picture the fast path sees too; none: []
    image_size: int  # pixels, side of those pictures

    def __post_init__(self) -> None:
        if not 0 <= self.min_age <= self.max_age or not 0 <= self.fresh_share <= 1 or self.frames < 1:
            raise UsageError(
                f"policy.fast_slow needs 0 <= min_age <= max_age, fresh_share in 0..1 and frames >= 1, got {self}."
            )


@dataclass(frozen=True)
class ConditionConfig:
    """Identifiers that steer the expert without a new encoding, each as an embedding on the action tokens."""

    modes: int  # behaviour modes of task switching (forward, rollback, advance); 0: none
    intents: int  # intents for classifier-free guidance; 0: none
    drop: float  # share of training chunks whose intent is hidden, so that guidance has its reference
    intent: int = -1  # when sampling: which intent to follow; -1 none
    scale: float = 1.0  # when sampling: classifier-free guidance towards it; 0 ignores it, 1 samples it plainly

    def __post_init__(self) -> None:
        if min(self.modes, self.intents) < 0 or not 0 <= self.drop <= 1 or not -1 <= self.intent < self.intents:
            raise UsageError(
                f"policy.conditions needs modes and intents of 0 or more, drop in 0..1 and intent in -1..intents-1, "
                f"got {self}."
            )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021) in place of training whole matrices."""

    rank: int
    alpha: float  # the adapters' output is scaled by alpha / rank
    dropout: float
    parts: tuple[Literal["vision", "text", "expert"], ...]  # whose matrices get adapters; their own weights stay still
    targets: tuple[str, ...]  # last names of those matrices, e.g. q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.parts or not self.targets or not 0 <= self.dropout < 1:
            raise UsageError(
                f"policy.lora needs rank >= 1, parts, targets and dropout in [0, 1), got {self}. Without: lora: null."
            )


@dataclass(frozen=True)
class TokenLossConfig:
    """The backbone itself learns to name each chunk in action tokens (pi0-FAST; knowledge insulation)."""

    tokenizer: str  # folder of an action tokenizer, made by `vla-data tokenizer`; copied into every checkpoint
    weight: float  # of this loss beside the head's
    backbone_learns_from: Literal["tokens", "both"]  # tokens: the head's loss stops at the cache (insulation)


@dataclass(frozen=True)
class ContinuationConfig:
    """Real-time chunking: how a new chunk continues the one that is under way while it is computed."""

    method: Literal["trained", "vjp", "identity", "prior"]  # trained: any head trained with policy.committed > 0;
    # vjp, identity: flow heads, guided while sampling; prior: heads over bins, drawn to the earlier bins
    schedule: Literal["hard", "linear", "exponential"]  # of the pull beyond the committed steps; `trained` has none
    strength: float  # largest guidance weight (5 in the paper); for `prior` logits added to the earlier bin


@dataclass(frozen=True)
class PolicyConfig:
    chunk: int  # H, steps predicted
    execute: int  # steps executed before planning anew
    state_dim: int  # padded width of the state vector
    action_dim: int  # padded width of an action
    cameras: tuple[str, ...]  # names, in the order of the prefix
    image_size: int  # pixels, side of the square the backbone sees
    max_tokens: int  # longest instruction, in tokens
    normalization: Normalization
    state: Literal["suffix", "prefix", "prompt", "none"]  # a token of the expert's (pi0), a last token of the prefix
    # (SmolVLA), digits in the prompt (pi0.5), or not seen
    backbone: BackboneConfig
    expert: ExpertConfig
    head: HeadConfig
    mixture: MixtureConfig | None = None
    fast_slow: FastSlowConfig | None = None
    conditions: ConditionConfig | None = None
    lora: LoraConfig | None = None
    token_loss: TokenLossConfig | None = None
    continuation: ContinuationConfig | None = None  # null: every chunk begins anew
    committed: int = 0  # steps at most already under way when a chunk is asked for: trains their continuation
    past: int = 0  # steps before the observation that are predicted too (past-token prediction)
    past_weight: float = 1.0  # of the loss on them, beside the loss on the chunk
    candidates: int = 1  # chunks drawn for each answer; the one whose past is nearest to what was executed is kept
    bars: Bars = "centred"  # where a picture that is not square has its black bars
    history: int = 0  # states before the observation that the policy gets

    def __post_init__(self) -> None:
        if not 1 <= self.execute <= self.chunk:
            raise UsageError(f"policy.execute must be 1..chunk ({self.chunk}), got {self.execute}.")
        if not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise UsageError(f"policy.cameras needs one or more different names, got {self.cameras}.")
        adaptive = getattr(self.head, "time", "none") == "adarms"
        if adaptive != (self.expert.norm == "adarms"):
            raise UsageError(
                f"policy.expert.norm is {self.expert.norm!r} and policy.head is {self.head}: the norms are 'adarms' "
                "exactly when the head's time is; heads without a time take 'rms'."
            )
        if isinstance(self.head, DiscreteDiffusionConfig | E0Config) and self.normalization != "quantile":
            raise UsageError(
                f"policy.head {self.head.kind!r} has its bins between the data's 1 % and 99 % quantiles and needs "
                f"policy.normalization 'quantile', got {self.normalization!r}."
            )
        self._check_options()

    @property
    def reads(self) -> Literal["cache", "hidden"]:
        """What the policy takes from its backbone: keys and values, or final hidden states too."""
        return "hidden" if self.token_loss is not None else "cache"

    def _check_options(self) -> None:
        if self.mixture is not None and self.mixture.horizons[-1] != self.chunk:
            raise UsageError(
                f"policy.mixture.horizons {list(self.mixture.horizons)} must end with policy.chunk, {self.chunk}."
            )
        if self.mixture is not None and self.expert.action_attention == "causal":
            raise UsageError(
                "policy.mixture needs policy.expert.action_attention 'bidirectional': with 'causal' no step sees a "
                "later one, so every horizon would predict the same."
            )
        if not 0 <= self.committed < self.chunk or min(self.past, self.history) < 0:
            raise UsageError(
                f"policy.committed must be 0..{self.chunk - 1}, policy.past and policy.history 0 or more, "
                f"got {self.committed}, {self.past} and {self.history}."
            )
        if self.token_loss is not None and self.fast_slow is not None:
            raise UsageError("policy.token_loss and policy.fast_slow do not go together; set one to null.")
        insulated = self.token_loss is not None and self.token_loss.backbone_learns_from == "tokens"
        if insulated and self.state == "prefix":
            raise UsageError(
                "policy.token_loss.backbone_learns_from 'tokens' does not go with policy.state 'prefix': the state's "
                "token is run through the backbone, and the head's loss with it. Take 'suffix' or 'prompt'."
            )
        self._check_looking_back()
        if self.continuation is not None:
            _check_continuation(self.continuation, self.head, self.committed)

    def _check_looking_back(self) -> None:
        if self.past and (self.mixture is not None or self.committed or self.continuation is not None):
            raise UsageError(
                "policy.past does not go together with policy.mixture, policy.committed or policy.continuation; set "
                "past to 0, or committed to 0 and the others to null."
            )
        if self.past_weight < 0 or self.candidates < 1 or (self.candidates > 1 and not self.past):
            raise UsageError(
                "policy.past_weight must be 0 or more and policy.candidates 1 or more, which with more than 1 are told "
                f"apart by policy.past; got {self.past_weight}, {self.candidates} and past {self.past}."
            )
        if self.history and self.state != "suffix":
            raise UsageError(f"policy.history needs policy.state 'suffix', got {self.state!r}.")
        if isinstance(self.head, FlowConfig) and self.head.source == "history" and not self.history:
            raise UsageError("policy.head.source 'history' needs policy.history of 1 or more, got 0.")


def _check_continuation(continuation: ContinuationConfig, head: HeadConfig, committed: int) -> None:
    method = continuation.method
    fits = {
        "trained": committed > 0,
        "vjp": isinstance(head, FlowConfig),
        "identity": isinstance(head, FlowConfig),
        "prior": isinstance(head, DiscreteDiffusionConfig | E0Config),
    }
    if not fits[method]:
        raise UsageError(
            f"policy.continuation.method {method!r} does not fit head {head.kind!r} with policy.committed {committed}: "
            f"{[m for m, fit in fits.items() if fit]} do ('trained' wants policy.committed > 0 in training)."
        )
