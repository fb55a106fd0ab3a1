"""Published facts about sets of others: classes, images by split, layouts, terms and citations.

`animesion.sources.published_sets` checks downloads against them, and `animesion recipes NAME --card` prints cards from
them. Sources of the numbers: the papers and pages of the sets, and the label files and tools of the GLSim, CLCA, DSILA
and FGIR-Backbones repositories.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class PublishedSet:
    """One published dataset.

    Attributes:
        name: of the recipe, such as `soy-ageing`.
        title: its authors' name for it.
        what: one sentence about the images.
        classes: number of classes.
        splits: image counts of a complete download by split (`train`, `val`, `test`); the name is empty for a set
            without a published split.
        per_class: images per class by split, for splits of which all classes have as many.
        groups: folders with an equal share of each split, such as the stages of SoyAgeing.
        validation: images in train and val when val is held out of the published train split; empty if unknown.
        aliases: names of the same set in other repositories.
        folders: possible names of the download's folder.
        layout: layout of a download, one line per path.
        facts: sentences to know before use.
        obtain: where to download it.
        homepage: URL for the card.
        citation: BibTeX.
        terms: licence of the images and terms of use.
        source: kind of the source that reads it.
        tags: tags for the card.
    """

    name: str
    title: str
    what: str
    classes: int
    splits: Mapping[str, tuple[int, ...]]
    layout: tuple[str, ...]
    facts: tuple[str, ...]
    obtain: str
    homepage: str
    citation: str
    terms: str = "not known, ask its authors"
    source: str = "benchmark"
    per_class: Mapping[str, int] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    validation: tuple[int, ...] = ()
    aliases: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(counts[0] for counts in self.splits.values())

    def with_counts(self, classes: int, splits: Mapping[str, int], per_class: Mapping[str, int]) -> PublishedSet:
        """The same set with other counts, for a drawn sample of it."""
        counts = {name: (count,) for name, count in splits.items()}
        return replace(self, classes=classes, splits=counts, per_class=dict(per_class), validation=())

    def select_group(self, group: str) -> PublishedSet:
        """The part of the set in one of its groups."""
        share = len(self.groups)
        return replace(
            self,
            groups=(group,),
            splits={name: tuple(count // share for count in counts) for name, counts in self.splits.items()},
            per_class={name: count // share for name, count in self.per_class.items()},
            validation=tuple(count // share for count in self.validation),
        )


_UFG = "https://github.com/XiaohanYu-GU/Ultra-FGVC"
_UFG_OBTAIN = (
    "The authors of Ultra-FGVC give it out on a page of Griffith University and as a Baidu Pan share (code ICCV); this "
    "program does not download it. Its terms are the authors'."
)
_UFG_CITATION = """@inproceedings{yu2021benchmark,
  title     = {Benchmark Platform for Ultra-Fine-Grained Visual Categorization Beyond Human Performance},
  author    = {Yu, Xiaohan and Zhao, Yang and Gao, Yongsheng and Yuan, Xiaohui and Xiong, Shengwu},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year      = {2021}
}"""
_CLASSES = "Classes are numbered from 1 in the files and from 0 in label files; they have no names."
_BY_NAME = "The split is in each file's name."
_ANNOTATED = "The split is in `anno/train.txt` and `anno/test.txt`: a file name, a space, the class."


def _ufg(name: str, title: str, what: str, **values: Any) -> PublishedSet:
    facts = (*values.pop("facts"), _CLASSES)
    return PublishedSet(
        name, title, what, facts=facts, obtain=_UFG_OBTAIN, homepage=_UFG, citation=_UFG_CITATION,
        source="ultra-fgvc", tags=("plants", "cultivar", "ultra-fine-grained"), **values,
    )  # fmt: skip


_FLAT = ("<class from 1>_<index>_train.png", "<class from 1>_<index>_test.png")
_ANNO = ("anno/train.txt", "anno/test.txt", "images/<name>.png")

_RESEARCH = "for non-commercial research and education; the photographs are their photographers'"
_ONE_BASED = "Classes are numbered from 1 in the files; class ids of a build start at 0, in the same order."

#: Sets of photographs and of cartoon faces, read by `animesion.sources.benchmarks`.
_BENCHMARKS = (
    PublishedSet(
        "cub-200-2011", "CUB-200-2011", "Photographs of birds of 200 species.",
        classes=200, splits={"train": (5994,), "test": (5794,)}, validation=(4794, 1200),
        aliases=("cub",), folders=("CUB_200_2011",),
        layout=(
            "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt",
            "images/<NNN.Species>/<name>.jpg",
        ),
        facts=(
            "The tables are joined by the number of the image, which starts at 1.",
            _ONE_BASED,
            "Some photographs are in ImageNet too: a network with ImageNet weights may have seen images of test.",
        ),
        obtain="Caltech's data repository has `CUB_200_2011.tgz`; unpack it.",
        homepage="https://www.vision.caltech.edu/datasets/cub_200_2011/", terms=_RESEARCH,
        citation="""@techreport{wah2011caltech,
  title       = {The Caltech-UCSD Birds-200-2011 Dataset},
  author      = {Wah, Catherine and Branson, Steve and Welinder, Peter and Perona, Pietro and Belongie, Serge},
  institution = {California Institute of Technology},
  number      = {CNS-TR-2011-001},
  year        = {2011}
}""",
        tags=("birds",),
    ),
    PublishedSet(
        "stanford-cars", "Stanford Cars", "Photographs of cars of 196 makes, models and years.",
        classes=196, splits={"train": (8144,), "test": (8041,)}, validation=(6442, 1702),
        aliases=("cars",), folders=("stanford_cars", "cars"),
        layout=(
            "cars_train/<NNNNN>.jpg", "cars_test/<NNNNN>.jpg", "cars_train_annos.mat", "cars_test_annos_withlabels.mat",
            "cars_meta.mat", "or car_ims/<NNNNNN>.jpg and cars_annos.mat",
        ),
        facts=(
            "`cars_test_annos.mat` of the devkit has no labels: `cars_test_annos_withlabels.mat` is a download of its "
            "own.",
            "The same image numbers occur in `cars_train` and `cars_test`.",
            "The one list of `cars_annos.mat` numbers all 16,185 images from `000001.jpg`; its field `test` has the "
            "split.",
            _ONE_BASED,
        ),
        obtain="The page of the set at Stanford is no longer served; mirrors have both forms of the download.",
        homepage="https://ai.stanford.edu/~jkrause/cars/car_dataset.html", terms=_RESEARCH,
        citation="""@inproceedings{krause2013cars,
  title     = {3D Object Representations for Fine-Grained Categorization},
  author    = {Krause, Jonathan and Stark, Michael and Deng, Jia and Fei-Fei, Li},
  booktitle = {IEEE International Conference on Computer Vision Workshops},
  year      = {2013}
}""",
        tags=("cars",),
    ),
    PublishedSet(
        "fgvc-aircraft", "FGVC-Aircraft", "Photographs of aircraft of 100 variants.",
        classes=100, splits={"train": (3334,), "val": (3333,), "test": (3333,)}, validation=(5267, 1400),
        aliases=("aircraft",), folders=("fgvc-aircraft-2013b",),
        layout=(
            "data/variants.txt", "data/images_variant_train.txt", "data/images_variant_val.txt",
            "data/images_variant_test.txt", "data/images/<NNNNNNN>.jpg",
        ),
        facts=(
            "Names of variants contain blanks and slashes, such as `F/A-18`; lists name images without `.jpg`.",
            "The lowest 20 rows of every image are a banner with its copyright: crop them before training.",
            "Results in the literature mostly train on train and val together, and test on test: `source.val=train`.",
            "Families and manufacturers, the coarser labels of the set, are not read.",
        ),
        obtain="The Visual Geometry Group of Oxford has `fgvc-aircraft-2013b.tar.gz`; unpack it.",
        homepage="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        terms="for non-commercial research only; the photographs are their photographers'",
        citation="""@techreport{maji2013fine,
  title       = {Fine-Grained Visual Classification of Aircraft},
  author      = {Maji, Subhransu and Kannala, Juho and Rahtu, Esa and Blaschko, Matthew and Vedaldi, Andrea},
  institution = {arXiv:1306.5151},
  year        = {2013}
}""",
        tags=("aircraft",),
    ),
    PublishedSet(
        "stanford-dogs", "Stanford Dogs", "Photographs of dogs of 120 breeds.",
        classes=120, splits={"train": (12000,), "test": (8580,)}, per_class={"train": 100}, validation=(9600, 2400),
        aliases=("dogs",), folders=("stanford_dogs", "dogs"),
        layout=("train_list.mat", "test_list.mat", "Images/<synset-Breed>/<synset>_<n>.jpg"),
        facts=(
            "`images.tar` and `lists.tar` are two downloads: unpack both into one folder.",
            "`Annotation/` has a file without a suffix for each image, with a box; it is not read.",
            "The photographs are ImageNet's training images: a network with ImageNet weights has seen those of test.",
            _ONE_BASED,
        ),
        obtain="The page of the set at Stanford has `images.tar` and `lists.tar`.",
        homepage="http://vision.stanford.edu/aditya86/ImageNetDogs/",
        terms="those of ImageNet: non-commercial research and education; the photographs are their photographers'",
        citation="""@inproceedings{khosla2011novel,
  title     = {Novel Dataset for Fine-Grained Image Categorization},
  author    = {Khosla, Aditya and Jayadevaprakash, Nityananda and Yao, Bangpeng and Fei-Fei, Li},
  booktitle = {First Workshop on Fine-Grained Visual Categorization, CVPR},
  year      = {2011}
}""",
        tags=("dogs",),
    ),
    PublishedSet(
        "flowers-102", "Oxford Flowers-102", "Photographs of flowers of 102 categories.",
        classes=102, splits={"train": (1020,), "val": (1020,), "test": (6149,)}, per_class={"train": 10, "val": 10},
        aliases=("flowers",), folders=("flowers-102", "oxford_flowers102"),
        layout=("imagelabels.mat", "setid.mat", "jpg/image_<NNNNN>.jpg"),
        facts=(
            "Train is `trnid` with 1,020 images. Copies in which `trnid` and `tstid` are exchanged, as some papers "
            "trained, are refused by their counts.",
            "Classes have numbers from 1 and no published names: they are called `flower-001` and so on.",
            "Results in the literature mostly train on train and val together: `source.val=train`.",
        ),
        obtain="The Visual Geometry Group of Oxford has `102flowers.tgz`, `imagelabels.mat` and `setid.mat`: unpack "
        "the first next to the others.",
        homepage="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        citation="""@inproceedings{nilsback2008automated,
  title     = {Automated Flower Classification over a Large Number of Classes},
  author    = {Nilsback, Maria-Elena and Zisserman, Andrew},
  booktitle = {Indian Conference on Computer Vision, Graphics and Image Processing},
  year      = {2008}
}""",
        tags=("plants", "flowers"),
    ),
    PublishedSet(
        "oxford-pets", "Oxford-IIIT Pets", "Photographs of cats and dogs of 37 breeds.",
        classes=37, splits={"train": (3680,), "test": (3669,)}, validation=(2941, 739),
        aliases=("pets",), folders=("oxford-iiit-pet", "oxford_iiit_pet"),
        layout=("annotations/trainval.txt", "annotations/test.txt", "images/<breed>_<n>.jpg"),
        facts=(
            "Names of cats start with a capital, names of dogs do not; the number after the last underscore is no part "
            "of a name.",
            "`images/` has 41 photographs that neither list names; they are skipped. Some files named `.jpg` are PNG "
            "or GIF files.",
            "Lists name images without `.jpg`. The published lists are trainval and test.",
            _ONE_BASED,
        ),
        obtain="The Visual Geometry Group of Oxford has `images.tar.gz` and `annotations.tar.gz`: unpack both into one "
        "folder.",
        homepage="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        terms="CC-BY-SA-4.0 for the set; the photographs are their photographers'",
        citation="""@inproceedings{parkhi2012cats,
  title     = {Cats and Dogs},
  author    = {Parkhi, Omkar M. and Vedaldi, Andrea and Zisserman, Andrew and Jawahar, C. V.},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year      = {2012}
}""",
        tags=("cats", "dogs"),
    ),
    PublishedSet(
        "food-101", "Food-101", "Photographs of 101 dishes.",
        classes=101, splits={"train": (75750,), "test": (25250,)}, per_class={"train": 750, "test": 250},
        validation=(60600, 15150), aliases=("food",), folders=("food-101",),
        layout=("meta/classes.txt", "meta/train.txt", "meta/test.txt", "images/<class>/<number>.jpg"),
        facts=(
            "Training labels were not cleaned and are partly wrong, by design; test labels were.",
            "Lists name images without `.jpg`.",
            "FGIR-Backbones holds out four fifths of the training images (15,150 and 60,600) instead of one fifth.",
        ),
        obtain="The Computer Vision Lab of ETH Zurich has `food-101.tar.gz`; unpack it.",
        homepage="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        terms="not the set's authors' to give: the photographs are from Foodspotting and their photographers'",
        citation="""@inproceedings{bossard2014food,
  title     = {Food-101: Mining Discriminative Components with Random Forests},
  author    = {Bossard, Lukas and Guillaumin, Matthieu and Van Gool, Luc},
  booktitle = {European Conference on Computer Vision},
  year      = {2014}
}""",
        tags=("food",),
    ),
    PublishedSet(
        "nabirds", "NABirds", "Photographs of North American birds of 555 visual categories.",
        classes=555, splits={"train": (23929,), "test": (24633,)}, validation=(18957, 4972),
        folders=("nabirds",),
        layout=(
            "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt", "images/<NNNN>/<name>.jpg",
        ),
        facts=(
            "`classes.txt` names 1,011 nodes of a tree, of which images have 555; class ids of a build follow the "
            "numbers of those. `hierarchy.txt` is not read.",
            "The tables are joined by a UUID. Names of classes contain blanks, and some state sex or age in brackets.",
            "`photographers.txt`, if it exists, gives the author of each image.",
        ),
        obtain="The Cornell Lab of Ornithology gives it out once its terms are accepted.",
        homepage="https://dl.allaboutbirds.org/nabirds",
        terms="those of the Cornell Lab, accepted before the download: non-commercial research, no redistribution",
        citation="""@inproceedings{vanhorn2015building,
  title     = {Building a Bird Recognition App and Large Scale Dataset with Citizen Scientists: The Fine Print in
               Fine-Grained Dataset Collection},
  author    = {Van Horn, Grant and Branson, Steve and Farrell, Ryan and Haber, Scott and Barry, Jessie and
               Ipeirotis, Panos and Perona, Pietro and Belongie, Serge},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year      = {2015}
}""",
        tags=("birds",),
    ),
    PublishedSet(
        "vegfru", "VegFru", "Photographs of 200 vegetables and 92 fruits.",
        classes=292, splits={"train": (29200,), "val": (14600,), "test": (116931,)},
        per_class={"train": 100, "val": 50}, validation=(35040, 8760), folders=("vegfru", "vegfru-dataset"),
        layout=(
            "veg200_lists/veg_train.txt", "veg200_lists/veg_val.txt", "veg200_lists/veg_test.txt",
            "fru92_lists/fru_train.txt", "fru92_lists/fru_val.txt", "fru92_lists/fru_test.txt",
            "veg200_images/<class>/<name>.jpg", "fru92_images/<class>/<name>.jpg",
        ),
        facts=(
            "Vegetables and fruits are two downloads with classes from 0 each: fruits follow the 200 vegetables here. "
            "Other label files may merge them in another order.",
            "Results in the literature mostly train on train and val together: `source.val=train`.",
            "The 25 upper-level categories are not read.",
        ),
        obtain="The authors give it out on request; see their repository.",
        homepage="https://github.com/ustc-vim/vegfru",
        citation="""@inproceedings{hou2017vegfru,
  title     = {VegFru: A Domain-Specific Dataset for Fine-Grained Visual Categorization},
  author    = {Hou, Saihui and Feng, Yushan and Wang, Zilei},
  booktitle = {IEEE International Conference on Computer Vision},
  year      = {2017}
}""",
        tags=("plants", "food"),
    ),
    PublishedSet(
        "inaturalist-2017", "iNaturalist 2017", "Photographs of 5,089 species of animals, plants and fungi.",
        classes=5089, splits={"train": (579184,), "val": (95986,)},
        aliases=("inat17",), folders=("inat2017", "inat17"),
        layout=("train2017.json", "val2017.json", "train_val_images/<kingdom>/<species>/<name>.jpg"),
        facts=(
            "Labels of the test images are not published: results in the literature are those on val.",
            "Long-tailed: training images follow how often people saw a species.",
            "Each image states its licence and the holder of its rights; both are kept.",
        ),
        obtain="The competition's page links `train_val_images.tar.gz` and `train_val2017.zip` with the annotations: "
        "unpack both into one folder.",
        homepage="https://github.com/visipedia/inat_comp/tree/master/2017",
        terms="one for each photograph, mostly CC-BY-NC; those of the competition are non-commercial research and "
        "education",
        citation="""@inproceedings{vanhorn2018inaturalist,
  title     = {The iNaturalist Species Classification and Detection Dataset},
  author    = {Van Horn, Grant and Mac Aodha, Oisin and Song, Yang and Cui, Yin and Sun, Chen and Shepard, Alex and
               Adam, Hartwig and Perona, Pietro and Belongie, Serge},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year      = {2018}
}""",
        tags=("plants", "animals", "long-tailed"),
    ),
    PublishedSet(
        "icartoonface", "iCartoonFace", "Faces of 5,013 cartoon characters.",
        classes=5013, splits={"": (389678,)}, folders=("personai_icartoonface_rectrain",),
        layout=(
            "icartoonface_rectrain/personai_icartoonface_rectrain_<NNNNN>/personai_icartoonface_rectrain_<NNNNN>_<n>.jpg",
        ),
        facts=(
            "These are the training images of the recognition task. Its test images show other characters, for "
            "verification and search, and are not read; so no split is published for classification, and the recipe "
            "makes its own, in which no duplicates straddle.",
            "Images have a margin around the face; the boxes of `icartoonface_rectrain_det.txt` are not read.",
            "Characters have numbers and no names: they are called `character-00000` and so on.",
        ),
        obtain="The authors' page links `personai_icartoonface_rectrain.zip`, which is read as it is.",
        homepage="https://github.com/luxiangju-PersonAI/iCartoonFace",
        citation="""@inproceedings{zheng2020cartoon,
  title     = {Cartoon Face Recognition: A Benchmark Dataset},
  author    = {Zheng, Yi and Zhao, Yifan and Ren, Mengyuan and Yan, He and Lu, Xiangju and Liu, Junhui and Li, Jia},
  booktitle = {ACM International Conference on Multimedia},
  year      = {2020}
}""",
        tags=("anime", "cartoon", "character-recognition"),
    ),
)  # fmt: skip

#: Label files of DAF:re, for both forms of its images; the `labels` source checks them.
DAF_RE = PublishedSet(
    "daf-re", "DAF:re", "Heads or whole images of 3,263 anime characters, long-tailed.",
    classes=3263, splits={"train": (322947,), "val": (46050,), "test": (94440,)},
    layout=("labels/train.csv", "labels/val.csv", "labels/test.csv", "fullMin256/<NNNN>/<post>.jpg"),
    facts=(), obtain="", homepage="https://arxiv.org/abs/2101.08674",
    citation="", source="labels",
)  # fmt: skip

PUBLISHED: dict[str, PublishedSet] = {
    each.name: each
    for each in (
        *_BENCHMARKS,
        _ufg(
            "cotton80", "Cotton80", "Leaves of 80 cotton cultivars, three for training and three for testing of each.",
            classes=80, splits={"train": (240,), "test": (240,)}, per_class={"train": 3, "test": 3},
            validation=(160, 80), aliases=("cotton",), folders=("cotton_square_new", "cotton80", "cotton"),
            layout=_FLAT, facts=(_BY_NAME,),
        ),
        _ufg(
            "soy-local", "SoyCultivarLocal",
            "Leaves of 200 soybean cultivars, three for training and three for testing of each.",
            classes=200, splits={"train": (600,), "test": (600,)}, per_class={"train": 3, "test": 3},
            validation=(400, 200), aliases=("soy", "soylocal"), folders=("soybean200_square", "soylocal", "soy"),
            layout=_FLAT, facts=(_BY_NAME, "GLSim's label files call this set `soy`."),
        ),
        _ufg(
            "soy-global", "SoyCultivarGlobal",
            "Leaves of 1,938 soybean cultivars, three for training and three for testing of each.",
            classes=1938, splits={"train": (5814,), "test": (5814,)}, per_class={"train": 3, "test": 3},
            validation=(3876, 1938), aliases=("soyglobal",), folders=("soybean2000", "soyglobal"),
            layout=_FLAT, facts=(_BY_NAME, "The folder is called soybean2000 but holds 1,938 classes."),
        ),
        _ufg(
            "soy-gene", "SoyGene", "Leaves of 1,110 soybean cultivars in unequal numbers.",
            classes=1110, splits={"train": (12763,), "test": (11143,)}, validation=(9562, 3201),
            aliases=("soygene",), folders=("soygene",),
            layout=_ANNO, facts=(_ANNOTATED, "A class has 3 to 15 images for training and 3 to 13 for testing."),
        ),
        _ufg(
            "soy-ageing", "SoyAgeing",
            "Leaves of 198 soybean cultivars at five stages of growth: R1, R3, R4, R5 and R6.",
            classes=198, splits={"train": (4950,), "test": (4950,)}, per_class={"train": 25, "test": 25},
            validation=(3960, 990), groups=("R1", "R3", "R4", "R5", "R6"),
            aliases=("soyageing",), folders=("soyageing",),
            layout=tuple(f"<stage>/{line}" for line in _ANNO),
            facts=(
                _ANNOTATED,
                "There is no stage R2. Each stage has 990 training and 990 test images, five of each class.",
                "DSILA's label files of single stages are called `train_R1.csv.csv`.",
            ),
        ),
        PublishedSet(
            "moeimouto", "moeimouto faces", "Faces of 173 anime characters, nearly balanced (32 to 161 images each).",
            classes=173, splits={"": (14397, 14395)}, folders=("moeimouto-faces", "moeimouto", "thumb"),
            layout=("thumb/<NNN>_<character>/face_<A>_<B>_<C>.png",),
            facts=(
                "Beside the images, which are 160x160, a folder has a `color.csv` and may have a file `ignore`.",
                "Folder numbers have gaps and end in 998 and 999, so a number is not a class id; ids here follow them.",
                "14,397 images are published, two of them (144_kotegawa_yui) not RGB; the first label files left "
                "those out and have 14,395.",
                "Label files of the animesion and the GLSim repositories were written in different unsorted orders: "
                "no class id of the 173 agrees, and 2,332 test images of the one are training images of the "
                "other. Labels and checkpoints of the two must not be mixed.",
                "No split is published with the images. Without label files the recipe makes its own, in which no "
                "duplicates straddle.",
            ),
            obtain="nagadomi's animeface-character-dataset, mirrored on Kaggle in "
            "`mylesoneill/tagged-anime-illustrations`. The images are their artists' works.",
            homepage="https://www.kaggle.com/datasets/mylesoneill/tagged-anime-illustrations", citation="",
            source="moeimouto", tags=("anime", "character-recognition"),
        ),
    )
}  # fmt: skip
