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

#: Name -> what it does.
ADAPTERS = {
    "ila": "down-sampling inter-layer adapters after two blocks (Rios et al., ECCV Workshops 2024)",
    "ila+": "ILA, and inter-layer adapters that keep the grid after all other blocks",
    "ila++": "ILA, and bottleneck adapters beside attention and MLP of every block",
    "adapter": "bottleneck adapters beside attention and MLP of every block (He et al., ICLR 2022)",
    "adapter-sequential": "a bottleneck adapter behind the MLP of every block (Pfeiffer et al., EACL 2021)",
    "convpass": "bottleneck adapters with a convolution over the grid in them (Jie and Deng, 2022)",
    "vpt-shallow": "learned prompts among the tokens (Jia et al., VPT, ECCV 2022)",
    "vpt-deep": "learned prompts of its own for every block (Jia et al., VPT, ECCV 2022)",
    "vqt": "learned queries that sum up every block for a wide linear head (Tu et al., CVPR 2023)",
    "lora": "low-rank updates of the attention's weights (Hu et al., ICLR 2022)",
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
    """An adapter by name.

    Args:
        name: one of `ADAPTERS`.
        depth: number of blocks of the transformer.
        width: D.
        grid: rows and columns of patches.
        patch_size: height and width of a patch, pixels.
        reference_compat: reproduce what we hold to be faults of the originals; each class says which.
        **options: of the method's classes: `ila.ILA`, `Adapters`, `ConvPass`, `prompts.PromptTuning`,
            `prompts.QueryTuning` and `LoRA`. `ila++` takes those of the first two; `dim` is for both.

    Returns:
        Plug-ins with their names, in the order in which they go on the host.

    Raises:
        UsageError: an unknown name or option, or a value that makes no sense; the possible ones are named.
    """
    parts = _parts(name)
    site = {
        "depth": depth,
        "width": width,
        "grid": grid,
        "patch_size": patch_size,
        "reference_compat": reference_compat,
    }
    takes = [set(inspect.signature(kind).parameters) for _, kind, _ in parts]
    own = {each for names, (_, _, fixed) in zip(takes, parts, strict=True) for each in names - fixed.keys()}
    own -= site.keys()
    if unknown := sorted(options.keys() - own):
        raise UsageError(f"adapter {name} has no option {', '.join(unknown)}: it has {', '.join(sorted(own))}")
    made = []
    for names, (role, kind, fixed) in zip(takes, parts, strict=True):
        given = {each: value for each, value in (site | options).items() if each in names}
        made.append((role, kind(**(given | fixed))))
    return made


def _parts(name: str) -> list[tuple[str, type[Plugin], dict[str, Any]]]:
    """Role, class and fixed options of each plug-in of an adapter."""
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
        raise UsageError(f"there is no adapter '{name}'{nearest(name, ADAPTERS)} There are {', '.join(ADAPTERS)}")
    return kinds[name]
