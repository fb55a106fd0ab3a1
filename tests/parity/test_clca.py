"""The original's outputs on small inputs: token reductions, CLA head and CLC cache, loaded through `from_reference`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

from safetensors import safe_open

from animesion_training import from_reference
from animesion_training.models.cla import CLAHead
from animesion_training.tokens.reductions import merging, pruning

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "fgir"
#: Compared with, not part of the method; the original's VQT slices from the wrong end of the sequence.
NOT_READ = {"clca_h2t_base", "clca_vqt_base"}
CASES = sorted(path.stem for path in GOLDEN.glob("clca_*.safetensors") if path.stem not in NOT_READ)
ABSENT = "reference outputs not found"
TOLERANCE = 2e-5
#: Discrete choices, which must be equal; other values may differ by rounding.
CHOICES = (
    "kept_idx",
    "fused_idx",
    "sample_ids",
    "mask",
    "keep_policy",
    "cluster_assign",
    "attn_size",
    "idx_centers",
    "idx_cluster",
)


def read(case):
    path = GOLDEN / f"{case}.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}
    out = {key.removeprefix("out."): value for key, value in tensors.items() if key.startswith("out.")}
    return config, weights, tensors["in.x"], out


@pytest.fixture(scope="module")
def ops():
    path = GOLDEN / "ops_unit.safetensors"
    if not path.is_file():
        pytest.skip(ABSENT)
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def of(ops, name):
    return {key.removeprefix(f"{name}."): value for key, value in ops.items() if key.startswith(f"{name}.")}


def loaded(module, tensors, names):
    """A module with the original's weights: pattern of the original's name -> ours."""
    weights = {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}
    for theirs, mine in names.items():
        weights = {key.replace(theirs, mine): value for key, value in weights.items()}
    module.load_state_dict(weights)
    return module.eval()


@pytest.mark.skipif(not CASES, reason=ABSENT)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_choices_equal_the_originals(case):
    config, weights, images, expected = read(case)
    with torch.inference_mode():
        logits, tokens = from_reference(config, weights).trace(images)
    error = (logits - expected.pop("logits")).abs().max().item()
    print(f"{case}: {error:.1e}")
    assert error <= TOLERANCE
    depth = config["model_kwargs"]["depth"]
    for side, place in (("tokens_in", 0), ("tokens_out", 1)):
        if side in expected:
            seen = [int(tokens.trace[f"block{i}.tokens"][place]) for i in range(depth)]
            assert seen == expected.pop(side).tolist()
    for name, value in expected.items():
        mine = tokens.trace[name]
        if name.endswith(CHOICES):
            assert torch.equal(mine.to(value.dtype), value), name
        else:
            assert torch.allclose(mine, value, atol=1e-4), name


@pytest.mark.skipif(not CASES, reason=ABSENT)
def test_settings_may_be_in_one_table_with_the_originals_model_name():
    case = "clca_evit_clca"
    config, weights, images, expected = read(case)
    flat = {"model_name": "evit_vit_tiny_patch16_224", "num_classes": 10, "image_size": 64, "num_heads": 4}
    flat |= {name: config["args"][name] for name in ("keep_rate", "reduction_loc")}
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    assert torch.allclose(from_reference(flat, wrapped)(images), expected["logits"], atol=TOLERANCE)


@pytest.mark.skipif(not CASES, reason=ABSENT)
def test_without_the_originals_faults_tome_keeps_to_its_plan():
    config, weights, images, _ = read("clca_tome_clca_kr25")
    _, faithful = from_reference(config, weights).trace(images)
    logits, tokens = from_reference(config, weights, reference_compat=False).trace(images)
    after = [[int(each.trace[f"block{i}.tokens"][1]) for i in (1, 2, 3, 4)] for each in (faithful, tokens)]
    # of 64 patches 16 are planned, then 4; there are also the class token and, at these blocks, 1, 3, 3 and 7 tokens of
    # the cache
    assert after == [[34, 36, 24, 28], [1 + 32 + 1, 1 + 16 + 3, 1 + 8 + 3, 1 + 4 + 7]]
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["tome_r5", "tome_r20"])
def test_merged_pairs_equal_the_originals(ops, name):
    case = of(ops, name)
    matching = merging.match_pairs(case["metric"], int(case["r"]))
    x, size = merging.merge_pairs(case["x"], case["size"][..., 0], matching)
    assert torch.allclose(x, case["out_x"], atol=1e-5)
    assert torch.allclose(size, case["out_size"][..., 0], atol=1e-5)
    source = torch.nn.functional.one_hot(matching.assignment(), x.shape[1]).transpose(1, 2)
    assert torch.equal(source.float(), case["source_adjacency"])


def test_density_peaks_equal_the_originals(ops):
    case = of(ops, "dpcknn")
    clusters = int(case["cluster_num"])
    centers, assignment = merging.density_peaks(case["x"], clusters, int(case["k"]))
    assert torch.equal(centers, case["idx_centers"])
    assert torch.equal(assignment, case["idx_cluster"])
    merged = merging.merge_clusters(case["x"], assignment, case["token_weight"], clusters)
    assert torch.allclose(merged, case["merged"], atol=1e-5)


def test_sampled_tokens_equal_the_originals(ops):
    case = of(ops, "ats")
    mask = case["mask"].bool()
    scores = (case["attn"][:, :, 0, 1:] * case["v"][:, :, 1:].norm(dim=-1)).sum(dim=1)
    steps = pruning.sampling_steps(int(case["K"]) - 1, reference_compat=True)
    assert torch.equal(steps, case["sample_steps"])
    drawn = pruning.inverse_samples(scores, steps, mask[:, 1:], reference_compat=True)
    distinct = [[0, *sorted({int(i) + 1 for i in row})] for row in drawn]
    assert distinct == case["out_ids"].tolist()


def test_softmax_with_policy_equals_the_originals(ops):
    case = of(ops, "dyvit_softmax_with_policy")
    weights = pruning.softmax_with_policy(case["attn"], case["policy"][..., 0])
    assert torch.allclose(weights, case["out"], atol=1e-6)


def test_keep_predictor_equals_the_originals(ops):
    case = of(ops, "dyvit_predictor")
    names = {"in_conv.0": "norm", "in_conv.1": "fc_in", "out_conv": "fc_out"}
    predictor = loaded(pruning.KeepPredictor(16, reference_compat=True), case, names)
    assert torch.allclose(predictor(case["x"], case["policy"][..., 0]), case["out"], atol=1e-6)


def test_complement_equals_the_originals(ops):
    case = of(ops, "evit_complement_idx")
    assert torch.equal(pruning.complement(case["idx"], int(case["dim"])), case["out"])


@pytest.mark.parametrize(
    ("name", "make", "names"),
    [
        ("sit", merging.SlimmingAssignment, {"weight.0": "norm", "weight.1": "fc_in", "weight.3": "fc_out"}),
        ("patchmerger", merging.QueryAssignment, {}),
        ("sinkhorn", merging.TransportAssignment, {"v": "centers"}),
    ],
)
def test_soft_assignments_equal_the_originals(ops, name, make, names):
    case = of(ops, f"{name}_module")
    module = loaded(make(16, 5), case, names)
    mixed, weights = module(case["x"])
    assert torch.allclose(weights, case["assign"], atol=1e-6)
    assert torch.allclose(weights @ mixed, case["out"], atol=1e-5)


def test_transport_equals_the_originals(ops):
    case = of(ops, "sinkhorn_log_ot")
    weights = merging.transport(case["scores"] / case["eps"], int(case["iters"]))
    assert torch.allclose(weights, case["out"], atol=1e-6)


def test_cla_head_equals_the_originals_in_evaluation_and_training(ops):
    case = of(ops, "cla_head")
    names = {"0.0.": "norm_in.", "0.1.": "layers.", "0.2.": "norm.", "0.4.": "fc."}
    head = loaded(CLAHead(4, 12, 7), case, names)
    assert torch.allclose(head(case["inp"]), case["out_eval"], atol=1e-5)
    assert torch.allclose(head.train()(case["inp"]), case["out_train"], atol=1e-5)
    assert torch.allclose(head.norm_in.running_mean, case["bn_in_running_mean_after"], atol=1e-6)
    assert torch.allclose(head.norm_in.running_var, case["bn_in_running_var_after"], atol=1e-6)
