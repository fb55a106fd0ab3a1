"""Networks: any timm model by name, with the heads and methods of this package.

`create_model` is the entry point. Importing this package registers its models with timm. Training, data and weight
files are left to the other packages.
"""

from __future__ import annotations

# registers the combinations of methods and baselines with timm
from animesion_training.models import registration as registration
from animesion_training.models.baselines import BASELINES, timm_name
from animesion_training.models.create import (
    HEADS,
    InputConfig,
    ModelSpec,
    create_model,
    head_parameters,
    input_config,
    spec_of,
)
from animesion_training.models.heads import CosineHead, IFAHead, exclusion_loss
from animesion_training.models.ifa import IFAVisionTransformer
from animesion_training.models.lrnet import LRNet
from animesion_training.models.methods import Methods
from animesion_training.models.pretrained import load_weights
from animesion_training.models.van import VAN
from animesion_training.models.vitfs import ViTFS

__all__ = [
    "BASELINES",
    "HEADS",
    "VAN",
    "CosineHead",
    "IFAHead",
    "IFAVisionTransformer",
    "InputConfig",
    "LRNet",
    "Methods",
    "ModelSpec",
    "ViTFS",
    "create_model",
    "exclusion_loss",
    "head_parameters",
    "input_config",
    "load_weights",
    "spec_of",
    "timm_name",
]
