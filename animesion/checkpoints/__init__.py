"""Checkpoints of any trainer: read their bytes without running code, and find the weights and settings in them.

Networks are not built here: `models.pretrained` fits weights to a network, `foreign` builds the network that a
checkpoint describes.
"""

from animesion.checkpoints.contents import Checkpoint, read_checkpoint
from animesion.checkpoints.names import cut_prefix

__all__ = ["Checkpoint", "cut_prefix", "read_checkpoint"]
