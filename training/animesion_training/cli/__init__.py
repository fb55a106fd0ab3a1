"""The commands that train, evaluate and export; they import torch only when they run."""
