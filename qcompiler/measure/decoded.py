"""What the codes of a site stand for, as the tensor that the graph holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.formats import QTensor
from qcompiler.formats.varied import Effective
from qcompiler.graph.sites import Site
from qcompiler.scratch import empty

_LARGE = 1 << 26  # bytes; in the scratch file from this size on


def decoded_weight(site: Site, codes: QTensor | Effective) -> npt.NDArray[Any]:
    """A weight, in the shape and type of its initializer, decoded in parts: it may be larger than what is free.

    Args:
        site: whose weight it is.
        codes: of its matrix [rows, columns].
    """
    tensor = site.weight.const_value
    assert tensor is not None
    found = empty(site.shape, tensor.dtype.numpy(), _LARGE)
    matrix = site.to_matrix(found)
    if np.may_share_memory(matrix, found):
        codes.decode(matrix)
    else:  # kernels of transposed convolutions, stacks of matrices
        found[...] = site.from_matrix(codes.decode())
    return found
