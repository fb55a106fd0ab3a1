"""The original's numbers for TGDA's method: CAL head, views, losses, schedule, and a whole step with toy networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from animesion_training.analysis import teacher_statistics
from animesion_training.data import views
from animesion_training.engine.optim import make_schedule
from animesion_training.losses import distillation
from animesion_training.losses.cal import FeatureCenters, cal_loss
from animesion_training.losses.objectives import create_objective
from animesion_training.models.cal import (
    CALClassifier,
    CALHead,
    CALOutput,
)
from animesion_training.recipe import ScheduleSection

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "tgda"


def read(name):
    path = GOLDEN / name
    if not path.is_file():
        pytest.skip("reference outputs not found")
    return json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.detach(), expected, rtol=tolerance, atol=tolerance)


def total(terms):
    return torch.stack(list(terms.values())).sum()


# -- the CAL head ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_cal_head_equals_the_originals(mode):
    golden = read("cal_head.safetensors")
    head = CALHead(16, 10)
    head.load_state_dict({key[3:]: value for key, value in golden.items() if key.startswith("sd.")})
    head.train(mode == "train")
    output = head(golden["feature_maps"], golden["train_fake_attention"] if mode == "train" else None)
    close(output.logits, golden[f"{mode}_logits"])
    close(output.effect, golden[f"{mode}_effect_logits"])
    close(output.features, golden[f"{mode}_feature_matrix"])
    close(output.attention, golden[f"{mode}_attention_maps"])
    if mode == "train":
        close(head.attentions.bn.running_mean, golden["train_running_mean_after"])
        close(head.attentions.bn.running_var, golden["train_running_var_after"])


def test_the_fake_attention_is_drawn_as_the_originals():
    golden = read("cal_head.safetensors")
    head = CALHead(16, 10)
    head.load_state_dict({key[3:]: value for key, value in golden.items() if key.startswith("sd.")})
    torch.manual_seed(321)
    close(head.train()(golden["feature_maps"]).effect, golden["train_effect_logits"])


def test_maps_are_weighted_and_drawn_as_in_the_original():
    golden = read("cal_head.safetensors")
    attention = golden["train_attention_maps"]
    close(views.pick_weights(attention), golden["train_pick_probs"], 1e-6)
    taken = torch.cat(views.select_maps(attention, golden["train_picked_indices"]), 1)
    assert torch.equal(taken, golden["train_attention_map_sampled"])
    close(views.mean_map(golden["eval_attention_maps"]), golden["eval_attention_map_mean"], 1e-6)


def test_class_maps_equal_the_originals():
    golden = read("cam_head.safetensors")
    # the notes have no names: matched by shapes
    [weight] = [value for key, value in golden.items() if key.endswith("weight") and value.ndim == 2]
    [features] = [value for value in golden.values() if value.ndim == 4 and value.shape[1] == weight.shape[1]]
    [logits] = [value for value in golden.values() if value.shape == (len(features), len(weight))]
    [maps] = [value for value in golden.values() if value.ndim > 2 and value.numel() == features[:, 0].numel()]
    close(views.class_map(features, weight, logits.argmax(1)), maps.view(len(features), 1, *features.shape[2:]))


# -- views -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "padding"), [(0.1, 0.05), (0.2, 0.1), (0.3, 0.1), (0.5, 0.1)])
def test_boxes_and_crops_equal_the_originals(threshold, padding):
    golden = read("cal_augment.safetensors")
    name = f"crop_t{threshold}_p{padding}"
    boxes = views.crop_boxes(golden["attention"], (64, 64), threshold, padding)
    assert torch.equal(boxes, golden[f"{name}.boxes_y0y1x0x1"])
    if f"{name}.out" in golden:
        close(views.crop(golden["images"], boxes), golden[f"{name}.out"], 1e-6)


def test_dropped_pixels_are_the_originals():
    golden = read("cal_augment.safetensors")
    assert torch.equal(views.drop_mask(golden["attention"], (64, 64), 0.35), golden["drop_t0.35.mask"].bool())


# -- losses ----------------------------------------------------------------------------------------------------------

COMPOSITES: dict[str, dict[str, Any]] = {
    "tgda_ce_T1_w1": {"temperature": 1, "weight": 1},
    "tgda_ce_T2_w1": {"temperature": 2, "weight": 1},
    "tgda_ce_T7_w1": {"weight": 1},
    "tgda_ce_T7_w0.2041": {},
    "tgda_ls0.1_T7_w0.2041": {"label_smoothing": 0.1},
    "kd_ce_T2_w10": {"temperature": 2, "weight": 10},
    **{f"tgda_{name}_T7_w1": {"weight": 1} for name in ("dkd", "rkd", "pkt", "hint", "trl", "kltrl")},
}
AUXILIARY = {"kltrl": "kl_trl", **{name: name for name in ("dkd", "rkd", "pkt", "hint", "trl")}}


@pytest.mark.parametrize("case", COMPOSITES)
def test_the_students_loss_and_its_gradient_equal_the_originals(case):
    golden, scalars = read("kd_losses.safetensors"), read("kd_losses_scalars.json")
    student, student_views = (golden[key].requires_grad_() for key in ("student", "student_aug"))
    more = () if case.startswith("kd_") else (student_views, golden["teacher_aug"])
    loss = total(
        distillation.distillation_loss(student, golden["teacher"], golden["targets"], *more, **COMPOSITES[case])
    )
    auxiliary = AUXILIARY.get(case.split("_")[1])
    if auxiliary:
        loss = loss + distillation.auxiliary_loss(auxiliary, student, golden["teacher"], golden["targets"], *more)
    assert loss.item() == pytest.approx(scalars[f"{case}.loss"], rel=1e-6)
    loss.backward()
    close(student.grad, golden[f"{case}.grad_student"], 1e-6)
    if more:
        close(student_views.grad, golden[f"{case}.grad_student_aug"], 1e-6)


def test_parts_of_the_loss_equal_the_originals():
    golden, scalars = read("kd_losses.safetensors"), read("kd_losses_scalars.json")
    student, teacher, targets = golden["student"], golden["teacher"], golden["targets"]
    found = {
        "ce": create_objective("cross-entropy")(student, targets),
        "ce_ls0.1": create_objective("cross-entropy", label_smoothing=0.1)(student, targets),
        "focal_g2": create_objective("focal")(student, targets),
        "dkd_a1_b0.5_T1": distillation.dkd(student, teacher, targets),
        "dkd_a1_b8_T4": distillation.dkd(student, teacher, targets, beta=8.0, temperature=4.0),
        "rkd_d25_a50": distillation.rkd(student, teacher),
        "pkt": distillation.pkt(student, teacher),
        "hint": distillation.hint(student, teacher),
        "trl_g2": distillation.trl(student, teacher, targets),
        "kltrl_g2": distillation.kl_trl(student, teacher),
        "supcon_labels": distillation.supcon(golden["supcon.feats"], targets),
        "simclr_nolabels": distillation.supcon(golden["supcon.feats"]),
    }
    for temperature in (1, 2, 7):
        found[f"kl_raw_T{temperature}_noT2"] = distillation.kl(student, teacher, temperature)
        found[f"kl_aug_T{temperature}_noT2"] = distillation.kl(
            golden["student_aug"], golden["teacher_aug"], temperature
        )
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {name: scalars[name] for name in found}, rel=1e-6
    )


def test_training_both_networks_adds_the_originals_terms():
    golden, scalars = read("kd_losses.safetensors"), read("kd_losses_scalars.json")
    student, teacher, targets = golden["student"], golden["teacher"], golden["targets"]
    more = golden["student_aug"], golden["teacher_aug"]
    labels = create_objective("cross-entropy")
    both = total(distillation.distillation_loss(student, teacher, targets, *more, weight=1))
    both = both + labels(teacher, targets) + labels(more[1], targets.repeat(2))
    assert both.item() == pytest.approx(scalars["tgda_trainboth_ce"], rel=1e-6)
    both = both + distillation.auxiliary_loss("cekd", student, teacher, targets, *more)
    assert both.item() == pytest.approx(scalars["tgda_trainboth_cekd"], rel=1e-6)


def test_the_teachers_loss_equals_the_originals():
    golden, scalars = read("kd_losses.safetensors"), read("kd_losses_scalars.json")
    count, features = len(golden["targets"]), golden["cal7.feature_matrix"]
    raw = CALOutput(golden["cal7.y_raw"], golden["cal7.y_aux"][:count], features, features)
    aug = CALOutput(golden["cal7.y_aug"], golden["cal7.y_aux"][count:], features, features)
    terms = cal_loss(raw, aug, golden["targets"], Given(golden["cal7.feature_center_batch"]))
    assert total(terms).item() == pytest.approx(scalars["cal_loss"], rel=1e-6)


class Given(nn.Module):
    """Fixed centers."""

    def __init__(self, centers):
        super().__init__()
        self.centers = centers

    def forward(self, targets):
        return self.centers


def test_the_teachers_confidence_is_measured_as_the_originals():
    golden, scalars = read("kd_losses.safetensors"), read("kd_losses_scalars.json")
    close(teacher_statistics.ratio_12(golden["teacher"]), golden["teacher_ratio_1_2_per_sample"], 1e-6)
    statistics = teacher_statistics.TeacherStatistics()
    statistics.update(golden["teacher"])
    found = statistics.results()
    expected = {name: value for name, value in scalars.items() if name in found}
    assert len(expected) == 16
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)


# -- the learning rate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["cub800_bs8", "teacher50_bs8", "toy"])
def test_the_learning_rate_of_every_iteration_is_the_originals(case):
    golden = read("lr_schedule.json")[case]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=golden["base_lr"])
    settings = ScheduleSection(
        kind="cosine-late", epochs=golden["epochs"], warmup_steps=500, warmup_lr=1e-6, min_lr=1e-5
    )
    schedule = make_schedule(optimizer, settings, golden["iters_per_epoch"])
    for iteration, expected in zip(golden["iteration"], golden["lr_used_at_iteration"], strict=True):
        schedule.step_update(iteration)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12, abs=0), iteration


# -- a whole step with toy networks ----------------------------------------------------------------------------------


class Toy(nn.Module):
    """Two convolutions with batch norm and ReLU, of the shapes in a state dict."""

    def __init__(self, shapes):
        super().__init__()
        self.layers = nn.ModuleList()
        for (out, into, kernel, _), biased, stride in zip(*shapes, (4, 2), strict=True):
            padding = kernel // 2 if kernel % 2 else (kernel - stride) // 2
            self.layers.append(nn.Conv2d(into, out, kernel, stride, padding, bias=biased))
            self.layers.append(nn.BatchNorm2d(out))

    def reset_classifier(self, num_classes, global_pool=""):
        pass

    def forward_features(self, x):
        for convolution, norm in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = norm(convolution(x)).relu()
        return x


class Pooled(nn.Module):
    """A toy with global average pooling and a linear layer."""

    def __init__(self, backbone, fc):
        super().__init__()
        self.backbone, self.fc = backbone, fc

    def forward(self, x):
        return self.fc(self.backbone.forward_features(x).mean((2, 3)))


def toy(golden, who):
    """The network with the original's weights, and our names of its parameters and buffers.

    The notes have no names: modules are matched by the shapes of their weights, whose widths all differ.
    """
    state = {key.removeprefix(f"{who}."): value for key, value in golden.items() if key.startswith(f"{who}.")}
    modules: dict[str, Any] = {}
    for key, value in state.items():
        module, _, part = key.rpartition(".")
        modules.setdefault(module, {})[part] = value
    places, shapes, biased, widths = {}, {}, {}, {}
    for module, parts in modules.items():
        weight = parts["weight"]
        if weight.ndim == 4 and weight.shape[1] in (3, 8):
            place = 0 if weight.shape[1] == 3 else 2
            places[module], shapes[place], biased[place] = f"backbone.layers.{place}", weight.shape, "bias" in parts
            widths[len(weight)] = place + 1
    for module, parts in modules.items():
        if "attentions" in module:
            places[module] = f"head.{module[module.index('attentions') :]}"
        elif parts["weight"].ndim == 2:
            places[module] = "head.fc" if who == "teacher" else "fc"
        elif "running_mean" in parts:
            places[module] = f"backbone.layers.{widths[len(parts['running_mean'])]}"
    backbone = Toy(([shapes[0], shapes[2]], [biased[0], biased[2]]))
    classifier = next(parts for parts in modules.values() if parts["weight"].ndim == 2)
    outputs, inputs = classifier["weight"].shape
    if who == "teacher":
        model: nn.Module = CALClassifier(backbone, len(classifier["weight"]), views="full")
    else:
        model = Pooled(backbone, nn.Linear(inputs, outputs, bias="bias" in classifier))
    names = {key: f"{places[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}" for key in state}
    model.load_state_dict({names[key]: value for key, value in state.items()})
    return model, names


def bicubic(images):
    return functional.interpolate(images, (32, 32), mode="bicubic", align_corners=False)


def test_a_step_of_tgda_equals_the_originals():
    golden = read("tgda_e2e.safetensors")
    teacher = toy(golden, "teacher")[0].train()
    student, names = toy(golden, "student")
    close(bicubic(golden["images"]), golden["bicubic32"])
    close(bicubic(golden["aug_images"]), golden["s_aug_images"])
    with torch.no_grad():
        close(teacher(golden["images"]), golden["t_raw"])
        close(teacher(golden["aug_images"]), golden["t_aug"])
    close(teacher.backbone.layers[1].running_mean, golden["teacher_b1_running_mean_after"])
    raw, aug = student(bicubic(golden["images"])), student(bicubic(golden["aug_images"]))
    close(raw, golden["s_raw"])
    close(aug, golden["s_aug"])
    loss = total(
        distillation.distillation_loss(
            raw, golden["t_raw"], golden["targets"], aug, golden["t_aug"], label_smoothing=0.1
        )
    )
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=1e-5)
    loss.backward()
    gradients = {key.removeprefix("grad.student."): v for key, v in golden.items() if key.startswith("grad.student.")}
    assert gradients
    for key, expected in gradients.items():
        close(student.get_parameter(names[key]).grad, expected, 1e-4)


def test_inference_of_toys_equals_the_originals():
    golden = read("tgda_e2e.safetensors")
    teacher, student = toy(golden, "teacher")[0].eval(), toy(golden, "student")[0].eval()
    images = golden["images"]
    with torch.no_grad():
        close(student(bicubic(images)), golden["s_eval"])
        parts = teacher.forward_parts(images)
        close(parts.logits, golden["t_eval_raw"])
        close(parts.logits, golden["cal_infer_ap_only"])
        close(teacher(images), golden["cal_infer_8view"], 2e-5)
        boxes = views.crop_boxes(views.mean_map(parts.attention), (64, 64), 0.3, 0.1)
        crops = views.crop(images, boxes)
        expected = golden["cal_infer_crop_t0.3"]
        close(crops if expected.ndim == 4 else teacher.forward_parts(crops).logits, expected)


def test_a_step_of_the_teacher_equals_the_originals():
    golden = read("tgda_e2e.safetensors")
    teacher, targets = toy(golden, "teacher")[0].train(), golden["targets"]
    centers = FeatureCenters(10, 32 * 16)
    torch.manual_seed(23)  # the original draws nothing else from torch
    raw = teacher.forward_parts(golden["images"])
    aug = teacher.forward_parts(golden["caltrain.aug_images"])
    close(raw.logits, golden["caltrain.raw"])
    close(aug.logits, golden["caltrain.aug"])
    close(torch.cat((raw.effect, aug.effect)), golden["caltrain.aux"])
    close(raw.features, golden["caltrain.feature_matrix"])
    close((raw.logits + aug.logits[: len(targets)]) / 2, golden["caltrain.pred"])
    # the notes do not state whether labels were smoothed
    losses = [total(cal_loss(raw, aug, targets, centers, label_smoothing=smoothing)) for smoothing in (0.0, 0.1)]
    close(centers(targets), golden["caltrain.feature_center_batch"])
    centers.move(raw.features.detach(), targets)
    rows = golden["caltrain.feature_center_rows"]
    close(centers.centers[targets] if len(rows) == len(targets) else centers.centers, rows)
    [loss] = [each for each in losses if each.item() == pytest.approx(golden["caltrain.loss"].item(), rel=1e-5)]
    loss.backward()
    close(teacher.head.fc.weight.grad, golden["caltrain.grad_fc"], 1e-4)
