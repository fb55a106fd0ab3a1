"""Adapters: small modules that are trained in or between the blocks of a frozen transformer."""

from animesion_training.tokens.adapters.factory import ADAPTERS, make_adapter
from animesion_training.tokens.adapters.ila import ILA
from animesion_training.tokens.adapters.in_block import Adapters, ConvPass, LoRA
from animesion_training.tokens.adapters.prompts import PromptTuning, QueryTuning

__all__ = ["ADAPTERS", "ILA", "Adapters", "ConvPass", "LoRA", "PromptTuning", "QueryTuning", "make_adapter"]
