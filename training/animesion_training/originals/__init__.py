"""The families of original checkpoints, one module each; importing this package registers them with `checkpoints`.

The order is from general to special: the last one registered is asked first.
"""

from animesion_training.originals import animesion_vit as animesion_vit
