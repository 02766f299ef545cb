"""Between what a robot or a data set says and what the model reads, both ways. No torch.

The same object prepares training rows and live observations, so there is one set of conventions.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from vla.codec import Codec
from vla.errors import TandemError, choose_from
from vla.images import resize_with_pad
from vla.policy_config import PolicyConfig
from vla.tokenizer import Tokenizer


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
        return np.stack([resize_with_pad(images[n], size) if n in images else blank for n in names]), present

    def text(self, instruction: str) -> tuple[np.ndarray, np.ndarray]:
        """An instruction as (T,) int64 ids padded to `max_tokens` and (T,) bool, true for real tokens.

        Raises:
            TandemError: the instruction is longer than `max_tokens`; it is never cut.
        """
        if instruction not in self._text:
            self._text[instruction] = self._tokenize(instruction)
        return self._text[instruction]

    def _tokenize(self, instruction: str) -> tuple[np.ndarray, np.ndarray]:
        ids, limit = self.tokenizer.encode(instruction), self.config.max_tokens
        if len(ids) > limit:
            raise TandemError(
                f"The instruction {instruction!r} has {len(ids)} tokens, policy.max_tokens is {limit}. "
                f"Raise policy.max_tokens or shorten the instruction."
            )
        padded = np.full(limit, self.tokenizer.pad_id, np.int64)
        padded[: len(ids)] = ids
        return padded, np.arange(limit) < len(ids)
