"""The leaf models: published counts, live parameters, settings, weights, swaps, export."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from leansense.core.cost import flops, mib, parameters, peak_memory, saved_bytes, train_step
from leansense.core.paths import root
from leansense.layers.linear_attention import LinearAttention2d, SoftmaxAttention2d
from leansense.leaf.model import (
    BACKBONES,
    VARIANTS,
    backbone_modules,
    build,
    check_size,
    load_weights,
    new_modules,
    swap_attention,
)

COUNTS = {  # K=4, MiB, K=10, MiB, live K=4
    "vanilla": (1_520_164, 5.7990, 1_523_626, 5.8122, 929_316),
    "bot": (1_748_980, 6.6718, 1_752_442, 6.6850, 1_158_132),
    "bot_linear": (1_748_980, 6.6718, 1_752_442, 6.6850, 1_158_132),
    "ca": (1_915_372, 7.3066, 1_918_834, 7.3198, 1_324_524),
    "eca": (1_853_095, 7.0690, 1_856_557, 7.0822, 1_262_247),
    "hybrid": (2_144_188, 8.1794, 2_147_650, 8.1926, 1_553_340),
}


def seeded(*args, seed=0, **settings):
    torch.manual_seed(seed)
    return build(*args, **settings)


def image(batch=2, size=64, seed=0):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts(variant):
    four, mib_four, ten, mib_ten, live = COUNTS[variant]
    for classes, expected, size in ((4, four, mib_four), (10, ten, mib_ten)):
        published = build(variant, classes, keep_unused_head=True)
        assert count(published) == expected and round(mib(expected), 4) == size
        assert parameters(published, image())["live"] == expected - 590_848
    assert count(build(variant, 4)) == live
    assert round(mib(1_158_132), 3) == 4.418


def test_reduction_changes_ca():
    assert count(build("ca", 4)) - count(build("ca", 4, reduction=32)) == 395_208 - 364_068
    assert count(build("ca", 4, reduction=16)) == count(build("ca", 4))
    assert count(build("bot", 4, pos="relative")) - count(build("bot", 4)) == 936


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("keep", [False, True])
def test_every_parameter_receives_a_gradient(variant, keep):
    """All of them by default; with the unused head, all but its weight and bias."""
    model = seeded(variant, 4, keep_unused_head=keep)
    model(image()).square().sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == ({"backbone.conv_head.weight", "backbone.conv_head.bias"} if keep else set())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_unused_head_changes_no_bit(variant):
    """The same seed draws the same weights with and without it, and the outputs are identical."""
    with_head, without = (
        seeded(variant, 4, keep_unused_head=keep).eval() for keep in (True, False)
    )
    assert torch.equal(with_head(image()), without(image()))
    other = seeded(variant, 4, seed=1).eval()
    state = {k: v for k, v in with_head.state_dict().items() if "conv_head" not in k}
    other.load_state_dict(state)
    assert torch.equal(other(image()), without(image()))


@pytest.mark.parametrize(
    "keep, backbone", [(True, (1_501_832, 16_024)), (False, (912_008, 15_000))]
)
def test_optimiser_groups(keep, backbone):
    """Decayed are weights of two dimensions and more outside of norms; groups are a partition."""
    from leansense.core.schedule import Group, param_groups

    model = build("bot_linear", 4, keep_unused_head=keep)
    parts = {"backbone": backbone_modules(model), "new": new_modules(model)}
    norms = {
        id(p)
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._NormBase)
        for p in m.parameters()
    }
    found = {}
    for name, modules in parts.items():
        own = [p for m in modules for p in m.parameters()]
        decayed = [p for p in own if p.ndim >= 2 and id(p) not in norms]
        found[name] = (
            sum(p.numel() for p in decayed),
            sum(p.numel() for p in own) - sum(p.numel() for p in decayed),
        )
    assert found == {"backbone": backbone, "new": (230_400, 724)}
    groups = param_groups(
        model, [Group(name, modules) for name, modules in parts.items()], weight_decay=1e-2
    )
    assert {g["name"]: sum(p.numel() for p in g["params"]) for g in groups} == {
        "backbone": backbone[0],
        "backbone_no_decay": backbone[1],
        "new": 230_400,
        "new_no_decay": 724,
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_group_is_covered(variant):
    model = build(variant, 3)
    parts = [*backbone_modules(model), *new_modules(model)]
    ids = [id(p) for part in parts for p in part.parameters()]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))


@pytest.mark.parametrize(
    "size, softmax, linear",
    [(224, 133.5, 133.2), (320, 274.5, 270.8), (384, 398.5, 389.6), (512, 724.3, 691.9)],
)
def test_mflops(size, softmax, linear):
    """2 per multiply-add; squeeze-and-excite counts, pooling, norms and activations do not."""
    x = image(1, size)
    assert round(flops(build("bot", 4), x) / 1e6, 1) == softmax
    assert round(flops(build("bot", 4, matrix=True), x) / 1e6, 1) == softmax
    assert round(flops(build("bot_linear", 4), x) / 1e6, 1) == linear
    if size == 224:
        assert round(flops(build("vanilla", 4), x) / 1e6, 1) == 109.8


def test_memory_is_the_same_with_either_attention_at_224():
    """What autograd keeps and the peak of a step: linear within a few per cent of softmax."""
    from torch.nn.functional import cross_entropy

    x, y = image(4, 224), torch.zeros(4, dtype=torch.long)
    peaks, kept = {}, {}
    for variant, settings in (("bot", dict(matrix=True)), ("bot_linear", {})):
        model = build(variant, 4, **settings)
        peaks[variant] = peak_memory(train_step(model, x, lambda logits: cross_entropy(logits, y)))
        kept[variant] = saved_bytes(model, x)
    for found in (peaks, kept):
        assert found["bot_linear"] == pytest.approx(found["bot"], rel=0.03)
        assert found["bot"] / 4 / 2**20 > 8, (
            "a backbone's activations at 224, whatever kernels make them"
        )
    model.eval()

    def timm_path():
        with torch.inference_mode():
            model.backbone.forward_features(x)

    def our_path():  # hands each result straight on, so the stem's map is released one step earlier
        with torch.inference_mode():
            model(x)

    assert peak_memory(our_path) <= 1.02 * peak_memory(timm_path)


@pytest.mark.parametrize("size", [32, 192, 224, 320])
def test_sizes(size):
    assert build("bot_linear", 4, image_size=size).eval()(image(1, size)).shape == (1, 4)
    assert check_size(size) == size


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 36, 48, 72, 144])
def test_heads_change_no_count(heads):
    for variant in ("bot", "bot_linear"):
        model = build(variant, 4, heads=heads)
        assert count(model) == 1_158_132 and model.eval()(image(1)).isfinite().all()


@pytest.mark.parametrize("stride, channels", [(32, 576), (16, 48), (8, 24)])
@pytest.mark.parametrize("variant", ["bot", "bot_linear"])
def test_attention_stride(variant, stride, channels):
    """The block stands behind the last stage of its stride; its inside stays as it is."""
    model = seeded(variant, 4, attn_stride=stride)
    seen = []
    model.block.register_forward_hook(
        lambda _, x, y: seen.append((tuple(x[0].shape), tuple(y.shape)))
    )
    model(image(2, 128)).square().sum().backward()
    side = 128 // stride
    assert seen == [((2, channels, side, side),) * 2]
    assert count(model.block.attention) == 62_208 and all(
        p.grad is not None for p in model.parameters()
    )
    assert isinstance(model.block.last, nn.ReLU if stride == 32 else nn.Identity)


def test_stride_makes_the_choice_matter():
    x = image(1, 224)

    def count_of(variant, stride):
        return flops(build(variant, 4, attn_stride=stride), x)

    shares = [count_of("bot", stride) / count_of("bot_linear", stride) for stride in (32, 16, 8)]
    assert shares[0] < 1.01 and shares[1] > 1.1 and shares[2] > 2


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(variant="bot_linaer"), "nearest is 'bot_linear'"),
        (
            dict(backbone="resnet50"),
            "backbone='resnet50' is unknown: choose from mobilenetv3_small",
        ),
        (
            dict(heads=5),
            r"heads=5 does not divide the 144 channels: choose from \[1, 2, 3, 4, 6, 8, 9, 12, 16",
        ),
        (dict(heads=0), "heads=0"),
        (dict(num_classes=1), "num_classes=1"),
        (dict(dropout=1.0), "dropout=1.0"),
        (dict(feature_map="gelu"), "feature_map='gelu' is unknown"),
        (dict(pos="rope"), "pos='rope' is unknown"),
        (dict(pos="relative"), "linear attention never computes"),
        (dict(attn_stride=4), "attn_stride=4 is unknown: choose from 32, 16, 8"),
        (dict(image_size=225), "use 224 or 256"),
        (dict(image_size=0), "use 32 or 64"),
        (dict(reduction=16), "no effect on 'bot_linear', only on ca, hybrid"),
        (dict(variant="ca", reduction=0), "reduction=0"),
        (dict(variant="ca", heads=8), "no effect on 'ca'"),
        (dict(variant="bot", feature_map="elu1"), "no effect on 'bot'"),
        (dict(variant="hybrid", attn_stride=16), "no effect on 'hybrid'"),
        (dict(matrix=True), "no effect on 'bot_linear'"),
        (dict(faithful=True, pos="none"), "contradicts faithful=True, where it is 'sincos_q'"),
        (dict(faithful=True, attn_stride=16), "contradicts faithful=True, where it is 32"),
        (dict(variant="bot", faithful=True, pos="relative"), "contradicts faithful=True"),
    ],
)
def test_errors_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(**{"variant": "bot_linear", "num_classes": 4} | settings)
    assert "\n" not in str(caught.value)


def test_faithful():
    linear, bot = build("bot_linear", 4, faithful=True), build("bot", 10, faithful=True)
    attention = linear.block.attention
    assert (attention.feature_map, attention.pos) == ("elu1", "sincos_q") and count(
        linear
    ) == 1_748_980
    assert (
        bot.block.attention.matrix
        and bot.block.attention.pos == "sincos_qk"
        and count(bot) == 1_752_442
    )
    assert count(build("vanilla", 4, faithful=True)) == 1_520_164
    assert (
        build("bot_linear", 4, faithful=True, feature_map="elu1", pos="sincos_q").config
        == linear.config
    )
    assert build("hybrid", 4).dropout.p == 0.2 and build("hybrid", 4, dropout=0.0).dropout.p == 0
    assert all(build(v, 4).dropout.p == 0.1 for v in VARIANTS if v != "hybrid")


def test_matrix_and_stream_are_the_same_function():
    matrix, stream = (seeded("bot", 4, matrix=m).eval() for m in (True, False))
    torch.testing.assert_close(matrix(image()), stream(image()), rtol=1e-4, atol=1e-5)


def test_deterministic():
    a, b = seeded("hybrid", 4), seeded("hybrid", 4)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    a.eval()
    assert torch.equal(a(image()), a(image()))
    single = torch.cat([a(image()[n : n + 1]) for n in range(2)])
    torch.testing.assert_close(single, a(image()), rtol=1e-4, atol=1e-6)


def test_swap():
    for start, other in (("bot", LinearAttention2d), ("bot_linear", SoftmaxAttention2d)):
        model = seeded(start, 4, heads=6, pos="sincos_q", attn_stride=16).double().eval()
        state = torch.get_rng_state()
        swapped = swap_attention(model)
        assert torch.equal(state, torch.get_rng_state())
        assert isinstance(swapped.block.attention, other) and swapped.block.attention.heads == 6
        assert model.config["variant"] == start and swapped.config["variant"] != start
        assert not torch.equal(swapped(image().double()), model(image().double()))
        assert torch.equal(swap_attention(swapped)(image().double()), model(image().double()))
        rebuilt = build(**swapped.config).double().eval()
        rebuilt.load_state_dict(swapped.state_dict())
        assert torch.equal(rebuilt(image().double()), swapped(image().double()))
    with pytest.raises(ValueError, match="not on 'ca'"):
        swap_attention(build("ca", 4))
    with pytest.raises(ValueError, match="relative"):
        swap_attention(build("bot", 4, pos="relative"))


def test_copies_are_independent():
    model = seeded("bot_linear", 4)
    clone = copy.deepcopy(model)
    assert (
        clone.block is not model.block and pickle.loads(pickle.dumps(model)).config == model.config
    )


@pytest.fixture(scope="module")
def donor():
    import timm

    torch.manual_seed(3)
    return timm.create_model("mobilenetv3_small_100")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("keep", [False, True])
def test_timm_weights(tmp_path, donor, name, keep):
    from safetensors.torch import save_file

    path = tmp_path / name
    save_file(donor.state_dict(), path) if name.endswith("safetensors") else torch.save(
        donor.state_dict(), path
    )
    model = build("bot", 4, weights=str(path), keep_unused_head=keep).eval()
    donor.eval()
    assert torch.equal(model.backbone.forward_features(image()), donor.forward_features(image()))
    if keep:
        assert torch.equal(model.backbone.conv_head.weight, donor.conv_head.weight)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "meta": {"epoch": 3}},
        lambda s: {
            "state_dict": {f"model.{k}": v for k, v in s.items()}
            | {"confusion.matrix": torch.zeros(2)}
        },
    ],
    ids=["plain", "model and meta", "lightning"],
)
def test_own_checkpoints(tmp_path, wrap):
    source = seeded("bot_linear", 4, keep_unused_head=True).eval()
    path = tmp_path / "best.pt"
    torch.save(wrap(source.state_dict()), path)
    loaded = build(
        "bot_linear", 4, weights=str(path), pretrained=True
    ).eval()  # the file goes first
    assert torch.equal(loaded(image()), source(image()))
    assert torch.equal(
        load_weights(build("bot", 4), path).eval()(image()), swap_attention(source)(image())
    )


def test_weights_of_another_net(tmp_path, donor):
    path = tmp_path / "other.pt"
    cases = [
        (
            build("bot", 10).state_dict(),
            r"classifier.weight has shape \(4, 576\) .* shape \(10, 576\) in the file",
        ),
        (
            build("vanilla", 4).state_dict(),
            "block.reduce.weight has shape .* in the model, none in the file",
        ),
        (
            {"stem.weight": torch.zeros(3)},
            "conv_stem.weight has shape .* in the model, none in the file",
        ),
        (
            donor.state_dict() | {"extra": torch.zeros(1)},
            r"extra has none in the model, shape \(1,\) in the file",
        ),
        ({"model": 3}, "holds no weights by name"),
        ([1, 2], "holds no weights by name"),
    ]
    for content, message in cases:
        torch.save(content, path)
        with pytest.raises(ValueError, match=message) as caught:
            build("bot", 4, weights=str(path))
        assert "\n" not in str(caught.value) and "other.pt" in str(caught.value)


def test_tensorflow_backbone_has_the_same_layers():
    """Names, shapes and first weights are the same; padding, variances and pixel range are not."""
    plain, other = (seeded("bot_linear", 4, backbone=name).eval() for name in BACKBONES)
    ours, theirs = plain.state_dict(), other.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert count(other) == 1_158_132 and other.config["backbone"] == "tf_mobilenetv3_small_100"
    assert plain.backbone.bn1.eps == 1e-5 and other.backbone.bn1.eps == 1e-3
    assert not torch.allclose(plain(image()), other(image()), rtol=1e-4, atol=1e-5)
    rebuilt = build(**other.config).eval()
    rebuilt.load_state_dict(theirs)
    assert torch.equal(rebuilt(image()), other(image()))
    assert flops(other, image(1, 224)) == pytest.approx(flops(plain, image(1, 224)), rel=1e-3)


def test_tensorflow_backbone_sees_pixels_from_minus_one_to_one():
    """What loaders give comes to its first layer as pixel / 127.5 - 1; padding stays zero there."""
    from leansense.core.images import normalise

    model = seeded("vanilla", 4, backbone="tf_mobilenetv3_small_100").eval()
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    seen = []
    model.backbone.conv_stem.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    found = model.features(normalise(pixels.clone()))
    torch.testing.assert_close(seen[0], 2 * pixels - 1, rtol=0, atol=1e-6)
    direct = model.backbone.forward_features(2 * pixels - 1).mean((2, 3))
    torch.testing.assert_close(found, direct, rtol=1e-3, atol=1e-5)
    assert seeded("vanilla", 4).input_range(pixels) is pixels


@pytest.fixture(scope="module")
def imagenet():
    path = root() / "data/weights/tf_mobilenetv3_small_100_backbone.pt"
    if not path.is_file():
        pytest.skip(
            f"no {path.name} in data/weights: papers/leaf/README.md says where it comes from"
        )
    return path


def test_imagenet_weights_of_the_tensorflow_backbone(imagenet):
    """They load whole, and the other backbone makes other features of them."""
    model = build(
        "bot_linear", 3, backbone="tf_mobilenetv3_small_100", weights=str(imagenet)
    ).eval()
    given = torch.load(imagenet, weights_only=True)
    own = model.backbone.state_dict()
    assert given.keys() <= own.keys() and all(torch.equal(own[k], given[k]) for k in given)
    other = build("bot_linear", 3, weights=str(imagenet)).eval()
    assert not torch.allclose(model.features(image(2, 96)), other.features(image(2, 96)), atol=1e-2)


def test_frozen_norms_keep_their_statistics(tmp_path, donor):
    """In training too, through copies and evaluation; their scales are still trained."""
    path = tmp_path / "w.pt"
    torch.save(donor.state_dict(), path)
    model = build("ca", 4, weights=str(path), frozen_norms=True).eval().train()
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    copy.deepcopy(model).train()(image()).square().sum().backward()
    model(image()).square().sum().backward()
    after = model.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and all(k.startswith("block.") for k in moved), "the block's own norms learn"
    assert not any(m.training for m in norms) and all(m.weight.grad is not None for m in norms)
    plain = build("ca", 4, weights=str(path)).train()
    plain(image())
    assert not torch.equal(
        plain.state_dict()["backbone.bn1.running_mean"], before["backbone.bn1.running_mean"]
    )
    assert "frozen_norms" not in model.config
    with pytest.raises(ValueError, match="frozen_norms=True .* give weights or pretrained"):
        build("bot", 4, frozen_norms=True)


class Thing:
    pass


def test_bad_weight_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        build("bot", 4, weights=str(tmp_path / "nowhere.pt"))
    for name, content in (("a.pt", b"not weights"), ("a.safetensors", b"\x00" * 4), ("b.pth", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: cannot be read") as caught:
            build("bot", 4, weights=str(tmp_path / name))
        assert "\n" not in str(caught.value)
    torch.save({"model": Thing()}, tmp_path / "object.pt")
    with pytest.raises(ValueError, match="object.pt: cannot be read .holds objects"):
        build("bot", 4, weights=str(tmp_path / "object.pt"))


def test_old_files_without_batch_counters(tmp_path, donor):
    path = tmp_path / "old.pth"
    torch.save({k: v for k, v in donor.state_dict().items() if "num_batches" not in k}, path)
    assert build("vanilla", 4, weights=str(path)) is not None


@pytest.fixture
def empty_cache(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return huggingface_hub


@pytest.mark.parametrize(
    "environment", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}]
)
def test_pretrained_without_the_hub_fails_at_once(monkeypatch, empty_cache, environment):
    """One line that says what to pass; the hub's own client, which retries, is never asked."""
    asked = []
    monkeypatch.setattr(empty_cache, "hf_hub_download", lambda *a, **k: asked.append(a))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for backbone, hub in BACKBONES.items():
        with pytest.raises(ConnectionError, match=f"{hub}.* pass weights=PATH") as caught:
            build("bot_linear", 4, pretrained=True, backbone=backbone)
        assert not asked and "\n" not in str(caught.value)


def test_pretrained_from_the_hub_and_from_its_cache(monkeypatch, empty_cache, tmp_path, donor):
    import urllib.request
    from io import BytesIO

    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file(donor.state_dict(), path)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: BytesIO())
    monkeypatch.setattr(empty_cache, "hf_hub_download", lambda repo, name, **k: str(path))
    fetched = build("vanilla", 4, pretrained=True)
    assert torch.equal(fetched.backbone.conv_stem.weight, donor.conv_stem.weight)
    monkeypatch.setattr(
        urllib.request, "urlopen", lambda *a, **k: pytest.fail("the cache was not used")
    )
    monkeypatch.setattr(empty_cache, "try_to_load_from_cache", lambda *a, **k: str(path))
    assert build("vanilla", 4, pretrained=True) is not None


def test_import_is_light():
    heavy = ("timm", "lightning", "torchvision", "huggingface_hub", "matplotlib")
    code = f"import sys, leansense.leaf.model; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("variant", ["bot_linear", "hybrid"])
def test_onnx(tmp_path, variant):
    """Exported once with a free batch, the file computes what PyTorch does."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = seeded(variant, 4, image_size=64).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        (image(2),),
        path,
        dynamo=True,
        input_names=["image"],
        verbose=False,
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
    )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        (found,) = session.run(None, {"image": image(batch, seed=batch).numpy()})
        torch.testing.assert_close(
            torch.from_numpy(found), model(image(batch, seed=batch)).detach(), rtol=0, atol=1e-4
        )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
def test_cuda_autocast_step(variant):
    model = seeded(variant, 4).cuda()
    with torch.autocast("cuda", torch.float16):
        loss = model(image(4, 224).cuda()).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
