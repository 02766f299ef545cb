"""Between what a robot or a data set says and what the model reads, both ways. No torch.

The same object prepares training rows and live observations, so there is one set of conventions.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from vla.codec import Codec
from vla.errors import TandemError, choose_from
from vla.images import resize_with_pad
from vla.policy_config import PolicyConfig
from vla.tokenizer import Tokenizer

STATE_BINS = 256


def prompt(instruction: str) -> str:
    """The instruction and the newline that ends it (pi0, SmolVLA)."""
    return instruction.strip() + "\n"


def prompt_with_state(instruction: str, state: np.ndarray) -> str:
    """The instruction and the state in digits (pi0.5).

    Args:
        state: (S,) model units; -1 to 1 is cut into 256 bins, 0 to 255. What lies below is -1, above 255.
    """
    edges = np.linspace(-1, 1, STATE_BINS + 1)[:-1]
    digits = " ".join(str(d) for d in np.digitize(state, edges) - 1)
    task = instruction.strip().replace("_", " ").replace("\n", " ")
    return f"Task: {task}, State: {digits};\nAction: "


class Processor:
    """Images, text, state and actions of one embodiment, in the form that `config` asks for."""

    def __init__(self, config: PolicyConfig, tokenizer: Tokenizer, codec: Codec) -> None:
        self.config, self.tokenizer, self.codec = config, tokenizer, codec
        self._text: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def images(self, images: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Camera name -> (H, W, 3) uint8 RGB becomes (V, h, w, 3) uint8 and which cameras are there (V,) bool.

        Raises:
            TandemError: none of the policy's cameras is there.
        """
        return self._pictures(images, self.config.cameras, self.config.image_size)

    def fast_images(self, images: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """As `images`, for the cameras that the fast path sees: (Vf, h, w, 3) uint8 and (Vf,) bool; Vf may be 0."""
        settings = self.config.fast_slow
        if settings is None or not settings.cameras:
            return np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0, bool)
        return self._pictures(images, settings.cameras, settings.image_size)

    def _pictures(
        self, images: Mapping[str, np.ndarray], names: Sequence[str], size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        present = np.array([name in images for name in names])
        if not present.any():
            raise TandemError(
                f"None of the policy's cameras {names} is in the observation, which has {sorted(images)}."
                f"{choose_from(names[0], images)} Map them in the recipe's or the robot's 'cameras'."
            )
        blank = np.zeros((size, size, 3), np.uint8)
        fit = partial(resize_with_pad, size=size, bars=self.config.bars)
        return np.stack([fit(images[n]) if n in images else blank for n in names]), present

    def text(self, instruction: str, state: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """An instruction as (T,) int64 ids padded to `max_tokens` and (T,) bool, true for real tokens.

        Args:
            state: (S,) physical units; read with `policy.state` 'prompt' alone, and needed there.

        Raises:
            TandemError: the prompt is longer than `max_tokens`; it is never cut.
        """
        if self.config.state == "prompt":
            if state is None:
                raise ValueError("policy.state 'prompt' needs the state")
            units = self.codec.encode_state(state)[: self.codec.state_spec.dim]
            return self._tokenize(prompt_with_state(instruction, units))
        if instruction not in self._text:
            self._text[instruction] = self._tokenize(prompt(instruction))
        return self._text[instruction]

    def _tokenize(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids, limit = self.tokenizer.encode(text), self.config.max_tokens
        if len(ids) > limit:
            raise TandemError(
                f"The instruction {text!r} has {len(ids)} tokens, policy.max_tokens is {limit}. "
                f"Raise policy.max_tokens or shorten the instruction."
            )
        padded = np.full(limit, self.tokenizer.pad_id, np.int64)
        padded[: len(ids)] = ids
        return padded, np.arange(limit) < len(ids)
