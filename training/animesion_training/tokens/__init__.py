"""Fine-grained methods on the tokens of a vision transformer: the host that owns the block loop, and its plug-ins."""

from animesion_training.tokens.host import Attended, Plugin, Tokens, TokenVisionTransformer, hosted

__all__ = ["Attended", "Plugin", "TokenVisionTransformer", "Tokens", "hosted"]
