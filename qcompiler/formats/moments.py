"""Second moments of what multiplies a weight, as a measure of its rounding errors: within each group, products too.

A group's part of the squared output error is e^T H e with H = E[x x^T] of its columns. The diagonal of H alone takes
inputs for uncorrelated; means that are not zero are the commonest reason why they are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompiler.formats.base import Floats


@dataclass(frozen=True, eq=False)
class Moments:
    """Of the groups of a tile of weights.

    Attributes:
        blocks: float32 [1 or rows, groups, width, width]; 1: all rows have the same inputs.
    """

    blocks: Floats

    @staticmethod
    def of(whole: Floats, products: npt.NDArray[np.intp], groups: int, columns: slice) -> Moments:
        """Those of a tile.

        Args:
            whole: float32 [products, columns, columns].
            products: [rows]: of which product each row of the tile is.
            groups: how many groups of one width the tile has in a row.
            columns: of the tile.
        """
        part = whole[:, columns, columns]
        split = part.reshape(len(whole), groups, part.shape[1] // groups, groups, -1)
        blocks = np.einsum("pgagb->pgab", split)
        return Moments(np.ascontiguousarray(blocks) if len(whole) == 1 else blocks[products])

    def times(self, errors: Floats) -> Floats:
        """H e for every group: float32 [rows * groups, width]."""
        groups, width = self.blocks.shape[1:3]
        split = errors.reshape(-1, groups, width)
        if len(self.blocks) == 1:
            found = np.matmul(split.swapaxes(0, 1), self.blocks[0]).swapaxes(0, 1)
        else:
            found = np.matmul(split[:, :, None], self.blocks)[:, :, 0]
        return found.reshape(errors.shape)


def diagonal(whole: Floats, rows: int) -> Floats:
    """What single columns weigh: float32 [rows, columns] of moments [products, columns, columns]."""
    own = np.einsum("pkk->pk", whole).clip(min=0)
    return np.repeat(own, rows // len(own), axis=0)
