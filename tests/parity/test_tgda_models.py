"""The original's LRNet and ViTFS on small inputs: outputs, gradients, running statistics; read by `from_reference`.

Full-size models have no stored weights: they are filled by the formula that the golden files were made with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

from safetensors.torch import load_file

from animesion.errors import UsageError
from animesion_training import from_reference, load_model, save_model
from animesion_training.models.vitfs_layers import sincos_positions

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "tgda"
TARGETS = torch.tensor([3, 7])
LRNETS = ["basic14", "bottleneck26", "basic14d"]
FULL_LRNETS = ["lrnet14", "lrnet18", "lrnet26", "lrnet34", "lrnet50"]
FULL_VITFS = ["nano", "micro", "tiny", "small"]


@pytest.fixture(autouse=True)
def one_thread():
    """As for the golden files, and faster for small networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def golden(name):
    path = GOLDEN / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"reference outputs not found ({name})")
    return load_file(path)


def weights_of(tensors):
    return {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}


def as_a_student(weights, encoder, head):
    names = {key: f"model.{encoder}{key}" for key in weights}
    names |= {f"{head}.{part}": f"model.dfsm.1.{part}" for part in ("weight", "bias")}
    return {names[key]: value for key, value in weights.items()}


def close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    print(f"{(ours - theirs).abs().max().item():.1e}")
    return torch.allclose(ours, theirs, atol=tolerance, rtol=tolerance)


def outputs_of(model, images, *names):
    """Outputs of submodules, by name."""
    seen: dict[str, Any] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: seen.setdefault(name, out.clone())
        )
        for name in names
    ]
    with torch.no_grad():
        seen["logits"] = model(images)
    for hook in hooks:
        hook.remove()
    return seen


# -- the formula that fills weights and inputs ------------------------------------------------------------------------


def uniforms(count, k):
    mask = numpy.uint64(0xFFFFFFFF)
    x = numpy.arange(count, dtype=numpy.uint64) * numpy.uint64(2654435761)
    x = (x + numpy.uint64((k * 2246822519 + 374761393) % 2**32)) & mask
    x ^= x >> numpy.uint64(15)
    x = x * numpy.uint64(2246822519) & mask
    x ^= x >> numpy.uint64(13)
    x = x * numpy.uint64(3266489917) & mask
    x ^= x >> numpy.uint64(16)
    return x.astype(numpy.float64) / 2**32


def filled(k, name, shape, kind):
    if kind == "keep":
        raise AssertionError(f"{name} is not filled")
    if kind == "zero":
        return torch.zeros(shape, dtype=torch.long)
    u = uniforms(int(numpy.prod(shape, dtype=int)), k)
    values = {
        "weight": lambda: (2 * u - 1) * (3 / numpy.prod(shape[1:], dtype=int)) ** 0.5,
        "bias": lambda: 0.2 * (u - 0.5),
        "scale": lambda: 0.75 + 0.5 * u,
        "gamma": lambda: 0.1 + 0.2 * u,
        "token": lambda: 2 * (u - 0.5),
        "rmean": lambda: 0.2 * (u - 0.5),
        "rvar": lambda: 0.5 + u,
    }[kind]()
    return torch.from_numpy(values.astype(numpy.float32)).reshape(shape)


def filled_images(batch, side):
    u = uniforms(batch * 3 * side * side, 9999)
    return torch.from_numpy((4 * (u - 0.5)).astype(numpy.float32)).reshape(batch, 3, side, side)


def filled_weights(manifest, side):
    weights = {}
    for k, name, shape, kind in manifest:
        if name == "sin2d_embedding":
            weights[name] = sincos_positions(side // 16, side // 16, shape[-1], torch.device("cpu")).flatten(0, 1)
        else:
            weights[name] = filled(k, name, shape, kind)
    return weights


def test_the_fill_gives_the_values_it_was_published_with():
    spots = {(0, 0): 0.01093084, (1, 0): 0.21373814, (2, 0): 0.03440474, (5, 9999): 0.67210444}
    for (j, k), u in spots.items():
        assert uniforms(j + 1, k)[j] == pytest.approx(u, abs=1e-8)


@pytest.mark.parametrize("case", LRNETS)
def test_the_fill_is_the_stored_weights_and_images(case):
    tensors = golden(f"lrnet_w8_{case}")
    manifest = json.loads((GOLDEN / f"lrnet_w8_{case}.manifest.json").read_text())
    for key, value in filled_weights(manifest, 64).items():
        assert torch.equal(value, tensors[f"sd.{key}"])
    assert torch.equal(filled_images(2, 64), tensors["x64"])


# -- LRNet, an eighth as wide -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LRNETS)
def test_lrnet_stages_and_logits(case):
    tensors = golden(f"lrnet_w8_{case}")
    model = from_reference({"num_classes": 10}, weights_of(tensors))
    stages = [key.removeprefix("feat32.") for key in tensors if key.startswith("feat32.")]
    seen = outputs_of(model, tensors["x32"], *stages)
    for stage in stages:
        assert close(seen[stage], tensors[f"feat32.{stage}"]), stage
    for side in (32, 64):
        assert close(model(tensors[f"x{side}"]), tensors[f"logits{side}"])
    student = from_reference({}, as_a_student(weights_of(tensors), "encoder.", "fc"))
    assert torch.equal(student(tensors["x64"]), model(tensors["x64"]))


@pytest.mark.parametrize("case", LRNETS)
def test_lrnet_training_step(case):
    tensors = golden(f"lrnet_w8_{case}")
    model = from_reference({}, weights_of(tensors)).train()
    logits = model(tensors["x64"])
    loss = torch.nn.functional.cross_entropy(logits, TARGETS)
    loss.backward()
    assert close(logits, tensors["train_logits64"])
    assert close(loss[None], tensors["train_loss64"])
    first = model.get_submodule(str(model.default_cfg["first_conv"]))
    assert close(first.weight.grad, tensors["train_grad_conv1"], 1e-4)
    assert close(model.fc.weight.grad, tensors["train_grad_fc"], 1e-4)
    assert close(model.bn1.running_mean, tensors["post_bn1.running_mean"])
    assert close(model.bn1.running_var, tensors["post_bn1.running_var"])


# -- ViTFS ------------------------------------------------------------------------------------------------------------


def test_position_embeddings():
    for key, theirs in golden("posemb").items():
        grid, dim = int(key.split("_")[1].split("x")[0]), int(key.split("x")[-1])
        ours = sincos_positions(grid, grid, dim, torch.device("cpu")).flatten(0, 1)
        assert close(ours, theirs, 1e-6)


def test_vitfs_tokens_in_the_originals_classifier():
    tensors = golden("vitfs_nano_64")
    model = from_reference({"model_name": "vitfs_nano_patch16_gap_reg4_dinov2_bn"}, weights_of(tensors))
    enters = []
    model.blocks[0].register_forward_pre_hook(lambda _, given: enters.append(given[0]))
    seen = outputs_of(model, tensors["x64"], "patch_embed", "blocks.0", "blocks.11")
    assert close(seen["patch_embed"].flatten(2).transpose(1, 2), tensors["patch_embed"])
    assert close(enters[0], tensors["pos_embed_out"])
    assert close(seen["blocks.0"], tensors["block0_out"])
    assert close(seen["blocks.11"], tensors["blocks_out"])
    assert close(model.forward_features(tensors["x64"]), tensors["features_ref"])
    assert close(seen["logits"], tensors["logits_avgpool_head"])


def test_vitfs_as_a_student_averages_the_registers_too(tmp_path):
    tensors = golden("vitfs_nano_64")
    student = from_reference({}, as_a_student(weights_of(tensors), "encoder.0.", "head"))
    features = student.forward_features(tensors["x64"])
    assert close(features, tensors["features_student_path"])
    assert close(student.forward_head(features, pre_logits=True), tensors["pooled_student_path"])
    save_model(student, tmp_path / "student.safetensors")
    loaded, _ = load_model(tmp_path / "student.safetensors")
    assert torch.equal(loaded(tensors["x64"]), student(tensors["x64"]))


@pytest.mark.parametrize("student", [False, True])
def test_vitfs_without_the_originals_slice(student):
    tensors = golden("vitfs_nano_64")
    weights = weights_of(tensors)
    weights = as_a_student(weights, "encoder.0.", "head") if student else weights
    model = from_reference({}, weights, reference_compat=False)
    features = model.forward_features(tensors["x64"])
    assert close(features, tensors["features_fixed"])
    assert close(model.forward_head(features, pre_logits=True), tensors["pooled_fixed"])


def test_vitfs_training_step():
    tensors = golden("vitfs_nano_64")
    model = from_reference({}, weights_of(tensors)).train()
    logits = model(tensors["x64"])
    loss = torch.nn.functional.cross_entropy(logits, TARGETS)
    loss.backward()
    assert close(logits, tensors["train_logits"])
    assert close(loss[None], tensors["train_loss"])
    assert close(model.reg_token.grad, tensors["train_grad_reg_token"], 1e-4)
    assert close(model.head.weight.grad, tensors["train_grad_head"], 1e-4)
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert close(norm[None], tensors["train_grad_norm"], 1e-4)


# -- full size, filled ------------------------------------------------------------------------------------------------


def full(part):
    """Golden tensors and manifests of the models whose names have this part."""
    tensors = golden("full_models_outputs")
    path = GOLDEN / "full_models_manifests.json"
    if not path.is_file():
        pytest.skip("the originals' manifests are not here")
    manifests = {name: each for name, each in json.loads(path.read_text()).items() if part in name}
    assert manifests, f"no model of this name among the manifests: {part}"
    return tensors, manifests


def sides_of(tensors, name):
    prefix = f"{name}.logits"
    return sorted(int(key.removeprefix(prefix)) for key in tensors if key.startswith(prefix))


@pytest.mark.parametrize("part", FULL_LRNETS)
def test_full_lrnet(part):
    tensors, manifests = full(part)
    for name, manifest in manifests.items():
        model = from_reference({"model_name": name}, filled_weights(manifest, 64))
        for side in sides_of(tensors, name):
            assert close(model(filled_images(1, side)), tensors[f"{name}.logits{side}"])
        stages = [key.split(".")[-1] for key in tensors if key.startswith(f"{name}.slice64.")]
        seen = outputs_of(model, filled_images(1, 64), *stages)
        for stage in stages:
            assert close(seen[stage][0, :4, :2, :2], tensors[f"{name}.slice64.{stage}"])
            assert close(seen[stage].abs().mean().reshape(1), tensors[f"{name}.absmean64.{stage}"].reshape(1))


@pytest.mark.parametrize("part", FULL_VITFS)
def test_full_vitfs(part):
    tensors, manifests = full(part)
    for name, manifest in manifests.items():
        for side in sides_of(tensors, name):
            weights = filled_weights(manifest, side)
            if "rpds" in name:
                with pytest.raises(UsageError, match=r"residual ones are not|do not match the"):
                    from_reference({"model_name": name}, weights)
                continue
            model = from_reference({"model_name": name}, weights)
            seen = outputs_of(model, filled_images(1, side), "patch_embed", "norm")
            tokens = seen["norm"]
            patches = seen["patch_embed"].flatten(2).transpose(1, 2)
            assert list(tokens.shape) == tensors[f"{name}.tok_shape{side}"].flatten().tolist()
            assert close(patches[0, :4, :8], tensors[f"{name}.patch_embed_slice{side}"].reshape(4, 8))
            assert close(tokens[0, :6, :8], tensors[f"{name}.tok_slice{side}"].reshape(6, 8))
            assert close(tokens.mean(1).flatten(), tensors[f"{name}.tok_mean{side}"].flatten())
            assert close(seen["logits"], tensors[f"{name}.logits{side}"])
