"""Fine-grained methods on the tokens of a vision transformer: the host that runs the block loop, and its plug-ins."""

from animesion_training.tokens.attention import Attended
from animesion_training.tokens.host import TokenVisionTransformer, check_backbone
from animesion_training.tokens.plugin import Plugin
from animesion_training.tokens.state import Tokens

__all__ = ["Attended", "Plugin", "TokenVisionTransformer", "Tokens", "check_backbone"]
