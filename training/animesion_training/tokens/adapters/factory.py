"""The names of the adapters, and the factory that makes their plug-ins."""

from __future__ import annotations

import inspect
from typing import Any

from animesion.config.settings import nearest
from animesion.errors import UsageError
from animesion_training.tokens.adapters.ila import ILA
from animesion_training.tokens.adapters.in_block import Adapters, ConvPass, LoRA
from animesion_training.tokens.adapters.prompts import PromptTuning, QueryTuning
from animesion_training.tokens.plugin import Plugin

#: Name -> description.
ADAPTERS = {
    "ila": "downsampling inter-layer adapters after two blocks (Rios et al., ECCV Workshops 2024)",
    "ila+": "ILA, plus inter-layer adapters without downsampling after all other blocks",
    "ila++": "ILA, plus bottleneck adapters parallel to the attention and the MLP of every block",
    "adapter": "bottleneck adapters parallel to the attention and the MLP of every block (He et al., ICLR 2022)",
    "adapter-sequential": "a bottleneck adapter after the MLP of every block (Pfeiffer et al., EACL 2021)",
    "convpass": "bottleneck adapters that contain a convolution over the grid (Jie and Deng, 2022)",
    "vpt-shallow": "learned prompts added to the input tokens (Jia et al., VPT, ECCV 2022)",
    "vpt-deep": "separate learned prompts for every block (Jia et al., VPT, ECCV 2022)",
    "vqt": "learned queries that summarise every block for a wide linear head (Tu et al., CVPR 2023)",
    "lora": "low-rank updates of the attention weights (Hu et al., ICLR 2022)",
}


def make_adapter(
    name: str,
    *,
    depth: int,
    width: int,
    grid: tuple[int, int],
    patch_size: tuple[int, int] = (16, 16),
    reference_compat: bool = False,
    **options: Any,
) -> list[tuple[str, Plugin]]:
    """Make the plug-ins of an adapter by name.

    Args:
        name: one of `ADAPTERS`.
        depth: number of blocks of the transformer.
        width: D.
        grid: (rows, columns) of patches.
        patch_size: (height, width) of a patch in pixels.
        reference_compat: reproduce what we consider faults of the originals, as documented in each class.
        **options: arguments of the class: `ILA`, `Adapters`, `ConvPass`, `PromptTuning`, `QueryTuning` or `LoRA`.
            `ila++` accepts those of the first two, and passes `dim` to both.

    Returns:
        (name, plug-in) pairs, in the order in which the host calls them.

    Raises:
        UsageError: an unknown name or option, or an invalid value; the message lists the possible ones.
    """
    parts = _parts(name)
    site = {
        "depth": depth,
        "width": width,
        "grid": grid,
        "patch_size": patch_size,
        "reference_compat": reference_compat,
    }
    accepted = [set(inspect.signature(kind).parameters) for _, kind, _ in parts]  # per class
    known = {option for names, (_, _, fixed) in zip(accepted, parts, strict=True) for option in names - fixed.keys()}
    known -= site.keys()
    if unknown := sorted(options.keys() - known):
        raise UsageError(f"adapter {name} has no option {', '.join(unknown)}: it has {', '.join(sorted(known))}")
    plugins = []
    for names, (role, kind, fixed) in zip(accepted, parts, strict=True):
        given = {option: value for option, value in (site | options).items() if option in names}
        plugins.append((role, kind(**(given | fixed))))
    return plugins


def _parts(name: str) -> list[tuple[str, type[Plugin], dict[str, Any]]]:
    """Role, class and fixed options of each plug-in of an adapter.

    The role is the plug-in's name on the host, and thus part of the names of its parameters.
    """
    kinds: dict[str, list[tuple[str, type[Plugin], dict[str, Any]]]] = {
        "ila": [("ila", ILA, {"padded": ()})],
        "ila+": [("ila", ILA, {"padded": None})],
        "ila++": [("ila", ILA, {"padded": ()}), ("adapters", Adapters, {})],
        "adapter": [("adapters", Adapters, {"path": "parallel", "convolution": None})],
        "adapter-sequential": [("adapters", Adapters, {"path": "sequential", "convolution": None})],
        "convpass": [("adapters", ConvPass, {})],
        "vpt-shallow": [("prompts", PromptTuning, {"deep": False})],
        "vpt-deep": [("prompts", PromptTuning, {"deep": True})],
        "vqt": [("queries", QueryTuning, {})],
        "lora": [("lora", LoRA, {})],
    }
    if name not in kinds:
        raise UsageError(f"there is no adapter '{name}'{nearest(name, ADAPTERS)}; there are {', '.join(ADAPTERS)}")
    return kinds[name]
