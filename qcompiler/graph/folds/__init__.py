"""The fold engine: transforms of a value that its producers and consumers absorb (one place for all of them).

fold = find_fold(model, value)            # a Fold, or a Refusal with the reason
fold.scale(fold.tied(s))                  # value / s, consumers * s
"""

from qcompiler.graph.folds.fold import Fold, find_fold
from qcompiler.graph.folds.region import Edit, Kind

__all__ = ["Edit", "Fold", "Kind", "find_fold"]
