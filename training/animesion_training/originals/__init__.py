"""The families of original checkpoints, one module each; importing this package registers them with `checkpoints`.

The order is from general to special: the last one registered is asked first.
"""

from animesion_training.originals import animesion_vit as animesion_vit
from animesion_training.originals import cal as cal
from animesion_training.originals import clca as clca
from animesion_training.originals import glsim as glsim
from animesion_training.originals import ila as ila
from animesion_training.originals import lrnet as lrnet
from animesion_training.originals import vitfs as vitfs
