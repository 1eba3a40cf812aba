"""Runs in the formats of other viewers."""

from flashmoe.trace.export.writer import FORMATS, Exported, export

__all__ = ["FORMATS", "Exported", "export"]
