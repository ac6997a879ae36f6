"""qcompiler: a compiler whose optimisation is precision."""

__version__ = "0.1.0"
