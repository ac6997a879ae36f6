"""The fold engine: transforms of a value that its producers and consumers absorb (one place for all of them).

fold = find_fold(model, value)            # a Fold, or a Refusal with the reason
fold.scale(fold.tied(s))                  # value / s, consumers * s
"""

from qcompiler.graph.folds.apply import untie
from qcompiler.graph.folds.fold import Fold, find_fold
from qcompiler.graph.folds.region import Edit, Kind
from qcompiler.graph.folds.stream import Stream
from qcompiler.graph.folds.stream_search import find_centred, find_stream

__all__ = ["Edit", "Fold", "Kind", "Stream", "find_centred", "find_fold", "find_stream", "untie"]
