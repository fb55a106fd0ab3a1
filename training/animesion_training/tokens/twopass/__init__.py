"""Methods with two passes: GLSim and RAMS-Trans encode the image, then a crop of the part that they select."""

from animesion_training.tokens.twopass.aggregators import ConvAggregator
from animesion_training.tokens.twopass.base import TwoPassTransformer
from animesion_training.tokens.twopass.glsim import GLSim, Selection
from animesion_training.tokens.twopass.rams_trans import RAMSTrans, Region

__all__ = ["ConvAggregator", "GLSim", "RAMSTrans", "Region", "Selection", "TwoPassTransformer"]
