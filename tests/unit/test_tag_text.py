"""Tags as text: token ids, masks and their schedules, the loss, and a network that learns tags from pictures."""

from __future__ import annotations

import json
import math

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

import numpy as np

from animesion.errors import UsageError
from animesion_training import create_model, predict, save_model
from animesion_training.cli.predict import predict as command
from animesion_training.text.masking import IGNORED, mask_share, mask_tags, tag_loss
from animesion_training.text.tokenizer import CLS, MASK, PAD, SEP, UNK, TagTokenizer, Texts, readable
from tests.conftest import draw

NAMES = ["1girl", "solo", "hat", "sword", "rain", "cat"]  # ids 5 to 10


# -- tokenizer ---------------------------------------------------------------------------------------------------------


def test_a_text_is_begin_tags_end_and_padding_in_the_order_of_the_vocabulary():
    tokenizer = TagTokenizer(NAMES, 7)
    assert tokenizer.vocab_size == 11
    assert tokenizer.encode(["hat", "1girl"]).tolist() == [CLS, 5, 7, SEP, PAD, PAD, PAD]
    assert tokenizer.encode([]).tolist() == [CLS, SEP, PAD, PAD, PAD, PAD, PAD]


def test_tags_that_do_not_fit_are_left_out_and_the_end_is_kept():
    assert TagTokenizer(NAMES, 5).encode(reversed(NAMES)).tolist() == [CLS, 5, 6, 7, SEP]
    assert TagTokenizer(NAMES, 3).encode(NAMES).tolist() == [CLS, 5, SEP]


def test_unknown_tags_are_one_token_behind_the_known_ones():
    tokenizer = TagTokenizer(NAMES, 6)
    assert tokenizer.encode(["dragon", "cat", "castle", "cat"]).tolist() == [CLS, 10, UNK, SEP, PAD, PAD]
    assert tokenizer.encode(["Cat", ""]).tolist() == [CLS, UNK, SEP, PAD, PAD, PAD]


def test_a_shuffled_text_has_the_same_tags_in_an_order_that_the_seed_decides():
    tokenizer = TagTokenizer(NAMES, 8)
    ids, ends = np.tile(tokenizer.ids(NAMES), 200), np.arange(6, 1201, 6)
    seeds = np.arange(200, dtype=np.int64)
    text = tokenizer.encode_batch(ids, ends, seeds)
    assert torch.equal(text, tokenizer.encode_batch(np.tile(tokenizer.ids(NAMES[::-1]), 200), ends, seeds))
    assert torch.equal(text[50:51], tokenizer.encode_batch(ids[:6], ends[:1], seeds[50:51]))
    assert (text[:, 0] == CLS).all()
    assert (text[:, 7] == SEP).all()
    assert text[:, 1:7].sort(1).values.tolist() == [[5, 6, 7, 8, 9, 10]] * 200
    firsts = torch.bincount(text[:, 1], minlength=11)[5:]
    assert firsts.min() > 15  # 33 on average
    in_order = TagTokenizer(NAMES, 8, order="vocabulary").encode_batch(ids, ends, seeds)
    assert in_order[:, 1:7].tolist() == [[5, 6, 7, 8, 9, 10]] * 200


def test_an_image_with_too_many_tags_shows_all_of_them_over_the_epochs():
    tokenizer = TagTokenizer(NAMES, 4)
    ids, ends = tokenizer.ids(NAMES), np.array([6])
    seen = {i for seed in range(60) for i in tokenizer.encode_batch(ids, ends, np.array([seed]))[0, 1:3].tolist()}
    assert seen == set(range(5, 11))


def test_decoding_returns_each_tag_once_without_special_tokens():
    tokenizer = TagTokenizer(NAMES, 6)
    text = torch.tensor([[CLS, 7, 5, 7, UNK, SEP], [CLS, MASK, SEP, PAD, PAD, PAD]])
    assert tokenizer.decode(text) == [["hat", "1girl"], []]
    with pytest.raises(UsageError, match="not of this vocabulary of 11"):
        tokenizer.decode(torch.tensor([[11]]))


def test_tags_are_read_from_masked_places_alone_and_each_once():
    tokenizer = TagTokenizer(NAMES, 5)
    logits = torch.full((1, 5, 11), -50.0)
    logits[0, 1, 5] = logits[0, 2, 5] = 50.0  # both masked places expect the same tag
    logits[0, 2, 8] = 50.0
    logits[0, 3, 10] = 50.0  # not masked
    logits[0, :, UNK] = 90.0  # never a tag
    [found] = tokenizer.read(logits, torch.tensor([[CLS, MASK, MASK, 6, SEP]]), top=3)
    assert found[:2] == [("1girl", 1.0), ("sword", 0.5)]
    assert found[2][1] < 1e-6


@pytest.mark.parametrize(
    ("names", "length", "message"),
    [
        (["a", "b", "a"], 5, "'a' twice"),
        (["a", "[UNK]"], 5, r"'\[UNK\]'"),
        ([], 5, "empty"),
        (["a"], 2, "length must be a whole number from 3"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused(names, length, message):
    with pytest.raises(UsageError, match=message):
        TagTokenizer(names, length)


def test_texts_of_samples_leave_out_what_a_network_must_not_read():
    names = ["cat", "miku", "dragon", "hat", "solo"]
    categories = ["general", "character", "general", "general", "general"]
    chosen = readable(names, categories, ["general"], classes=["hat"])
    assert chosen == ("cat", "", "dragon", "", "solo")
    tags, ends = np.array([0, 1, 1, 2, 3, 4]), np.array([2, 2, 3, 6])
    texts = Texts.of(TagTokenizer(NAMES, 5), chosen, tags, ends)
    text = texts.text(np.array([3, 0, 1, 2]))
    # the last sample has an unknown tag, one that names a class, and `solo`
    assert text.tolist() == [[CLS, 6, UNK, SEP, PAD], [CLS, 10, SEP, PAD, PAD], *[[CLS, SEP, PAD, PAD, PAD]] * 2]


# -- masks -------------------------------------------------------------------------------------------------------------


def test_the_sigmoid_schedule_rises_from_none_after_a_tenth_to_all_at_half_of_the_steps():
    # (1 - cos(pi t)) / 2 with t = (p - 0.1) / 0.4: t = 1/4 gives (1 - sqrt(1/2)) / 2
    expected = {0.0: 0, 0.05: 0, 0.1: 0, 0.2: 0.146447, 0.3: 0.5, 0.4: 0.853553, 0.5: 1, 0.75: 1, 1.0: 1}
    for progress, share in expected.items():
        assert mask_share("sigmoid", progress) == pytest.approx(share, abs=1e-6)
    assert mask_share("sigmoid", 0.5, warmup=0, cooldown=0) == pytest.approx(0.5)
    assert mask_share("sigmoid", 0.7, warmup=0.7, cooldown=0.3) == 1  # a step without a ramp
    assert [mask_share(name, 0.3) for name in ("none", "bert", "full")] == [0, 0.15, 1]
    with pytest.raises(UsageError, match="schedule must be one of"):
        mask_share("linear", 0.3)  # type: ignore[arg-type]


def many(count=4000):
    text = torch.tensor([[CLS, 5, 6, 7, UNK, SEP, PAD]]).repeat(count, 1)
    return text, torch.arange(count, dtype=torch.int64) * 7919 + 13


def test_tags_are_masked_with_the_probability_and_special_tokens_never():
    text, seeds = many()
    masked = mask_tags(text, seeds, 0.15, vocab_size=11)
    places = masked.targets != IGNORED
    assert not places[:, [0, 4, 5, 6]].any()
    share = places[:, 1:4].float().mean().item()
    assert share == pytest.approx(0.15, abs=4 * math.sqrt(0.15 * 0.85 / 12000))
    assert torch.equal(masked.targets[places], text[places])
    assert (masked.text[places] == MASK).all()
    assert torch.equal(masked.text[~places], text[~places])
    again = mask_tags(text[5:9], seeds[5:9], 0.15, vocab_size=11)
    assert torch.equal(again.text, masked.text[5:9])


def test_no_share_masks_nothing():
    text, seeds = many(50)
    masked = mask_tags(text, seeds, 0.0, vocab_size=11)
    assert torch.equal(masked.text, text)
    assert (masked.targets == IGNORED).all()


def test_a_text_that_is_masked_whole_does_not_tell_the_number_of_tags():
    text, seeds = many(50)
    masked = mask_tags(text, seeds, 1.0, vocab_size=11)
    assert masked.text.tolist() == [[CLS, MASK, MASK, MASK, MASK, MASK, SEP]] * 50
    assert masked.targets.tolist() == [[IGNORED, 5, 6, 7, IGNORED, IGNORED, IGNORED]] * 50


def test_a_share_of_images_has_unknown_tags():
    text, seeds = many()
    masked = mask_tags(text, seeds, 0.0, vocab_size=11, unknown=0.25)
    whole = (masked.text[:, 1] == MASK).float().mean().item()
    assert whole == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
    assert ((masked.targets != IGNORED).sum(1).unique().tolist()) == [0, 3]


def test_masked_places_can_have_random_tags():
    text, seeds = many()
    masked = mask_tags(text, seeds, 0.5, vocab_size=11, replace="random")
    places = masked.targets != IGNORED
    drawn = torch.bincount(masked.text[places], minlength=11)
    assert drawn[:5].sum() == 0
    assert drawn[5:].min() > 800
    assert torch.equal(masked.text[~places], text[~places])


def test_the_loss_is_the_mean_over_the_tags_of_an_image_and_then_over_images():
    logits = torch.zeros(3, 4, 8)
    logits[0, 1, 5] = math.log(7)  # 7 of 14: probability 1/2
    targets = torch.full((3, 4), IGNORED)
    targets[0, 1], targets[0, 2], targets[1, 3] = 5, 6, 7
    # image 1: (log 2 + log 8) / 2 = 2 log 2; image 2: log 8 = 3 log 2; image 3: nothing
    assert tag_loss(logits, targets).item() == pytest.approx(5 * math.log(2) / 3, rel=1e-6)
    halves = (tag_loss(logits[:1], targets[:1]) + 2 * tag_loss(logits[1:], targets[1:])) / 3
    assert halves.item() == pytest.approx(5 * math.log(2) / 3, rel=1e-6)
    assert tag_loss(logits, torch.full((3, 4), IGNORED)).item() == 0


# -- networks ----------------------------------------------------------------------------------------------------------


def small(**options):
    torch.manual_seed(0)
    return create_model(
        "vit_tiny_patch16",
        3,
        32,
        text="vilt",
        depth=2,
        embed_dim=48,
        num_heads=3,
        method_options={"text": {"vocab_size": 11, "length": 5, "dropout": 0.0, **options}},
    )


def test_a_network_of_tags_is_a_network_of_images_as_well():
    model = small().eval()
    images = torch.rand(2, 3, 32, 32)
    text = torch.tensor([[CLS, 5, 7, SEP, PAD], [CLS, 10, SEP, PAD, PAD]])
    logits, tag_logits = model(images, text, with_tags=True)
    assert logits.shape == (2, 3)
    assert tag_logits.shape == (2, 5, 11)
    assert torch.equal(model(images, text), logits)
    assert model(images).shape == (2, 3)
    assert not torch.allclose(model(images), logits)
    assert model.forward_features(images).shape == (2, 48)


def test_predict_shows_the_tags_that_the_network_expects(tmp_path):
    model = small().eval()
    with torch.no_grad():
        model.tags.tagger.bias[5 + NAMES.index("rain")] = 50.0
    facts = {"text": {"names": NAMES, "categories": ["general"]}}
    draw(1, 40).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    for name, given in (("named", facts), ("unnamed", {})):
        save_model(model, tmp_path / f"{name}.safetensors", ("x", "y", "z"), given)
    good, bad = predict(tmp_path / "named.safetensors", [tmp_path / "a.png", tmp_path / "b.png"], top=2, device="cpu")
    [plain] = predict(tmp_path / "unnamed.safetensors", tmp_path / "a.png", top=2, device="cpu")
    assert (plain.guesses, plain.tags, bad.guesses, bad.tags) == (good.guesses, {}, (), {})
    [(category, [best, _])] = good.tags.items()
    assert (category, best[0]) == ("general", "rain")
    assert best[1] == pytest.approx(1.0)
    shown = CliRunner().invoke(
        command, ["--checkpoint", str(tmp_path / "named.safetensors"), str(tmp_path / "a.png"), "--device", "cpu"]
    )
    assert "\n  general: rain 100.0%, " in shown.output
    line = CliRunner().invoke(
        command, ["--checkpoint", str(tmp_path / "named.safetensors"), str(tmp_path / "a.png"), "--json"]
    )
    assert set(json.loads(line.stdout)) == {"path", "guesses", "tags"}


def test_every_parameter_of_both_losses_gets_a_gradient():
    model = small()
    text = torch.tensor([[CLS, 5, MASK, SEP, PAD]])
    logits, tag_logits = model(torch.rand(1, 3, 32, 32), text, with_tags=True)
    targets = torch.tensor([[IGNORED, IGNORED, 7, IGNORED, IGNORED]])
    (logits.sum() + tag_loss(tag_logits, targets)).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_weights_of_a_plain_transformer_start_a_network_of_tags(tmp_path):
    plain = create_model("vit_tiny_patch16", 3, 32, depth=2, embed_dim=48, num_heads=3)
    path = tmp_path / "plain.pth"
    torch.save(plain.state_dict(), path)
    model = create_model(
        "vit_tiny_patch16",
        3,
        32,
        text="vilt",
        pretrained=path,
        depth=2,
        embed_dim=48,
        num_heads=3,
        method_options={"text": {"vocab_size": 11, "length": 5}},
    )
    assert torch.equal(model.backbone.blocks[1].attn.qkv.weight, plain.blocks[1].attn.qkv.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "clip"}, "there is no text 'clip'"),
        ({"name": "resnet18"}, "need a plain vision transformer"),
        ({"reduction": "evit", "keep_rate": 0.5}, "with no other method"),
        ({"adapter": "lora"}, "with no other method"),
        ({"head": "cla"}, "head linear, cls or ifa"),
        ({"method_options": {"text": {"vocab_size": 5}}}, "vocab_size must be a whole number from 6"),
        ({"method_options": {"text": {"words": 9}}}, "text vilt has no option words"),
        ({"method_options": {"text": {"dropout": 1.0}}}, "dropout must be"),
        ({"name": "vit_tiny_patch16", "global_pool": "avg"}, "pools by 'avg': use head cls"),
    ],
)
def test_a_network_that_cannot_read_tags_is_refused(change, message):
    given = {"name": "vit_tiny_patch16", "num_classes": 3, "img_size": 32, "text": "vilt"} | change
    with pytest.raises(UsageError, match=message):
        create_model(**given)


def test_text_for_a_network_of_images_alone_is_refused():
    model = create_model("lora_vit_tiny_patch16", 3, 32, depth=2)
    with pytest.raises(UsageError, match="reads images alone"):
        model(torch.rand(1, 3, 32, 32), torch.tensor([[CLS, 5, SEP]]))
    with pytest.raises(UsageError, match="does not predict"):
        small(tagging=False)(torch.rand(1, 3, 32, 32), torch.tensor([[CLS, 5, SEP]]), with_tags=True)


def test_a_masked_tag_is_learnt_from_the_picture_and_from_the_other_tag():
    """The first tag names the colour of the picture; the other two name each other, and no picture shows them."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = small(vocab_size=12)  # three colours, two hours, two lights
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    def batch(count):
        colour, hour = (torch.randint(n, (count,), generator=generator) for n in (3, 2))
        images = 0.3 * torch.rand(count, 3, 32, 32, generator=generator)
        images[torch.arange(count), colour] += 0.5
        begin, end = torch.full_like(colour, CLS), torch.full_like(colour, SEP)
        return images, torch.stack([begin, 5 + colour, 8 + hour, 10 + hour, end], dim=1)

    def loss(images, text, places):
        targets = torch.full_like(text, IGNORED)
        targets[:, places] = text[:, places]
        masked = text.clone()
        masked[:, places] = MASK
        return tag_loss(model(images, masked, with_tags=True)[1], targets)

    for step in range(100):
        images, text = batch(32)
        value = loss(images, text, [1, 3] if step % 2 else [1, 2])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        images, text = batch(200)
        # the entropies of the priors are log 3 = 1.10 and log 2 = 0.69
        assert loss(images, text, [1]) < 0.1
        assert loss(images, text, [3]) < 0.1
        assert loss(images.roll(1, 0), text, [1]) > 1
        # with both masked, nothing tells them
        assert loss(images, text, [2, 3]) > 0.6
