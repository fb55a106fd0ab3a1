"""Checkpoints of the original research systems: one module per family, and `from_reference`, which reads them.

Importing this package registers the families.
"""

from importlib import import_module

from animesion_training.originals.base import from_reference

#: Modules of the families, from general to special. They are registered in this order, and the last one registered is
#: asked first, because a checkpoint can match a general family as well: a CAL head matches the teachers of `cal`.
FAMILIES = ("backbones", "animesion_vit", "cal", "clca", "glsim", "cal_head", "ila", "lrnet", "vitfs", "vilt")

for _name in FAMILIES:
    import_module(f"{__name__}.{_name}")

__all__ = ["FAMILIES", "from_reference"]
