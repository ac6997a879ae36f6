"""Calibration and evaluation data: one validator for all sources, one class that serves batches."""

from __future__ import annotations

from qcompiler.calibration.data import Calibration
from qcompiler.calibration.validate import Block, feeds_check

__all__ = ["Block", "Calibration", "feeds_check"]
