"""Rows as the user has them -> batches of tensors. Imports no other room."""

from hflit.data.formats import DatasetModule, FrameModule, RowsModule, data_module
from hflit.data.labels import Labels
from hflit.data.module import DataModule

__all__ = ["DataModule", "DatasetModule", "FrameModule", "Labels", "RowsModule", "data_module"]
