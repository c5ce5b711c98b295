"""What keys and values of a prompt's tokens depend on: the tokens so far, their positions, the images among them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Media:
    """Images and videos in a row.

    Attributes:
        places: bool (n,), which tokens stand for them.
        digest: 32 bytes of all that the model gets of them.
    """

    places: np.ndarray
    digest: bytes


@dataclass(frozen=True)
class PromptRow:
    """A row's tokens, integers (n,).

    Attributes:
        positions: int32 (n, axes); None where they count the tokens from 0.
        media: None where all is text.
    """

    tokens: np.ndarray
    positions: np.ndarray | None = None
    media: Media | None = None

    @staticmethod
    def of(tokens: np.ndarray, positions: np.ndarray | None, media: Media | None = None) -> "PromptRow":
        """A row with `positions`, integers (n, axes), or None."""
        if positions is not None and (positions == np.arange(len(tokens))[:, None]).all():
            positions = None
        return PromptRow(tokens, None if positions is None else positions.astype(np.int32), media)

    def __len__(self) -> int:
        return len(self.tokens)

    def full_blocks(self, block_size: int, end: int | None = None) -> list[bytes]:
        """What the full blocks of the tokens before `end` hold: equal bytes, after equal ones, are equal keys.

        Those are the tokens themselves; then positions where these do not count them; then the digest where an image
        is among them. Rows share the text in front of other images.
        """
        data, size = np.ascontiguousarray(self.tokens[:end], np.int32).tobytes(), 4 * block_size
        full = [data[start : start + size] for start in range(0, len(data) // size * size, size)]
        stored = len(full) * block_size
        if self.positions is not None:
            axes = self.positions.shape[1]
            positions = self.positions[:stored].reshape(len(full), block_size * axes)
            counted = np.arange(stored).repeat(axes).reshape(positions.shape)
            for block in np.flatnonzero((positions != counted).any(1)):
                full[block] += positions[block].tobytes()
        if self.media is not None:
            for block in np.flatnonzero(self.media.places[:stored].reshape(len(full), block_size).any(1)):
                full[block] += self.media.digest
        return full

    def usable(self, known: int) -> int:
        """How many of the `known` first tokens need not be computed: all images among them, or none of one."""
        if self.media is None or not self.media.places[known:].any():
            return known
        return min(known, int(self.media.places.argmax()))

    def holds_media(self, known: int) -> bool:
        """Whether there are images, all of them among the `known` first tokens."""
        return self.media is not None and not self.media.places[known:].any()

    def followed_by(self, tokens: np.ndarray) -> "PromptRow":
        """This row and the `tokens`, integers (m,), that were generated after it."""
        positions, media = self.positions, self.media
        if positions is not None:
            more = np.arange(1, len(tokens) + 1, dtype=np.int32)
            positions = np.concatenate([positions, positions[-1] + more[:, None]])
        if media is not None:
            media = Media(np.concatenate([media.places, np.zeros(len(tokens), bool)]), media.digest)
        return PromptRow(np.concatenate([self.tokens, tokens]), positions, media)
