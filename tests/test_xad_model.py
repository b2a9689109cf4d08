"""XAD's network: every published count, every switch, what is repaired and what is not."""

import itertools

import pytest
import torch
from torch import nn

from leansense.layers.deform_layer import DeformLayer, sine_encoding
from leansense.layers.trunk import from_efficientnet_pytorch
from leansense.xad.model import (
    BASELINE,
    CAMERAS,
    DEMO,
    DEPTHS,
    REFINERS,
    TEXT_HEADS,
    build,
    compile_model_bevtxt,
    compile_model_lss,
    compile_model_onlybev,
    compile_model_vovnet_transformer,
    convert_original,
    example,
    load_pretrained,
    module_groups,
    parts,
)

FROZEN = 21_657  # frustum and grid, which the published code stores as parameters
HEAD = 2_599_400  # the end of an EfficientNet-B4 that it builds and does not use


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def counted(**settings):
    """A model whose parameters have sizes and no values."""
    with torch.device("meta"):
        return build(**settings)


def small(**settings):
    """A model that runs in milliseconds; its norms change what passes."""
    torch.manual_seed(0)
    grid = {"xbound": [-48.0, 48.0, 6.0], "ybound": [-48.0, 48.0, 6.0]}
    own = {
        "backbone": "vov19",
        "width": 0.05,
        "grid_conf": DEMO["grid_conf"] | grid,
        "dropout": 0.0,
    }
    model = build(**own | {"final_h": 64, "final_w": 96} | settings)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)  # some start at zero and let nothing through
        if isinstance(module, DeformLayer):  # between pixels, where there is one slope
            nn.init.uniform_(module.self_attn.sampling_offsets.bias, 0.1, 0.4)
    return model


# --- counts ---

V39 = {"backbone": "vov39", "ese_every_block": False}
TIMM = {"ese_every_block": False}


@pytest.mark.parametrize("settings, number", [
    ({}, 75_716_200),
    (TIMM, 68_366_952),
    (V39, 29_736_616),
    (V39 | {"text_head": "bev_txt"}, 39_691_229),
    (V39 | {"text_head": "unified_v3"}, 35_892_894),
    (V39 | {"text_head": "unified_v2"}, 35_629_214),
    (V39 | {"text_head": "unified_v1"}, 35_100_574),
    (V39 | {"text_head": "unified_v3", "depth": "v1_c3"}, 33_518_808),
    (TIMM | {"backbone": "vov57", "text_head": "unified_v3"}, 49_932_894),
    (TIMM | {"text_head": "unified_v3"}, 74_523_230),
    (TIMM | {"text_head": "unified_v3", "depth": "v1_c3"}, 72_149_144),
    (TIMM | {"depth": "v1_c3", "refiner": "none"}, 65_285_346),
    (TIMM | {"depth": "v1_c3", "refiner": "conv"}, 65_986_578),
    (TIMM | {"refiner": "none"}, 67_659_432),
    ({"depth": "v1_c3", "refiner": "none"}, 72_634_594),
    ({"refiner": "none"}, 75_008_680),
    (BASELINE, 34_021_415),
    (BASELINE | {"text_head": "onlybev"}, 33_321_562),
    (BASELINE | {"pretrain": True}, 29_178_038),
    (BASELINE | {"pretrain": True, "backbone": "effb0", "outC": 1}, 14_313_575),
])  # fmt: skip
def test_published_counts(settings, number):
    assert count(counted(**settings, faithful=True)) == number


@pytest.mark.parametrize("settings, less", [
    ({}, FROZEN), (V39, FROZEN), (BASELINE, FROZEN + HEAD),
    (BASELINE | {"text_head": "onlybev"}, FROZEN + HEAD + 4_131_840),  # an unused part more
])  # fmt: skip
def test_ours_has_what_is_used(settings, less):
    ours, theirs = counted(**settings), counted(**settings, faithful=True)
    assert count(ours) == count(theirs) - less
    assert all(p.requires_grad for p in ours.parameters())


def test_counts_by_module():
    """Every module of the published table, to the unit."""
    full, base = counted(text_head="unified_v3"), counted(**BASELINE, faithful=True)
    old, v1 = counted(), counted(depth="v1_c3", refiner="conv", text_head="bev_txt")
    head, bev, text = full.camera.head, full.bev_encoder, full.text
    numbers = {
        head.depth_net: 4_154_863, head.depth_net.depth_c3: 1_780_777,
        head.depth_net.depth_c4: 2_370_601, head.depth_net.fusion: 3_485, head.feat_proj: 98_432,
        bev.compress: 33_536, bev.refiner: 707_520, bev.refiner.self_attn: 180_928,
        bev.refiner.self_attn.sampling_offsets: 32_896, bev.seg_head: 369_476,
        bev.refiner.self_attn.attention_weights: 16_448,
        v1.camera.head.depth_net: 1_780_777, v1.bev_encoder.refiner: 701_232,
        v1.text: 10_761_809, v1.text.adapter: 5_900_288, old.text: 807_196,
        old.text.bev_post: 18_448, old.text.action_head: 394_116, old.text.desc_head: 394_632,
        text: 6_963_474, text.feature_pyramid: 3_672_320, text.scene: 2_231_296,
        text.camera_transformer: 528_640, text.bev_fusion: 263_680,
        text.unified_predictor: 267_538,
        base.camera.trunk: 19_341_616, base.camera.trunk.head: HEAD,
        base.camera.head.up1: 5_163_008, base.camera.head.depthnet: 53_865,
        base.bev_encoder: 4_597_892, base.text: 4_843_377, base.text.scene: 4_131_840,
        base.text.bev_post: 304, base.text.front.conv: 73_792, base.text.front.linear: 281_640,
        base.text.side: 73_792 + 281_640, base.text.action: 164, base.text.front_desc: 164,
        base.text.side_desc: 41,
    }  # fmt: skip
    wrong = {n: (count(m), n) for m, n in numbers.items() if count(m) != n}
    assert not wrong
    assert sum(p.numel() for p in base.parameters() if not p.requires_grad) == FROZEN


# --- switches ---

COMBINATIONS = [
    (depth, refiner, head)
    for depth, refiner, head in itertools.product(DEPTHS, REFINERS, TEXT_HEADS)
    if (refiner, head) != ("resnet18", "unified_v3")
]


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("depth", DEPTHS)
def test_combinations(depth, faithful):
    """Three outputs of the right shapes, and a gradient for all that is trained."""
    for _, refiner, head in (c for c in COMBINATIONS if c[0] == depth):
        model = small(depth=depth, refiner=refiner, text_head=head, faithful=faithful)
        model.eval()  # in training a norm takes away what a bias before it adds
        bev, action, description = model(*example(model, 2))
        assert bev.shape == (2, 4, 16, 16) and action.shape == (2, 4)
        assert description.shape == (2, 8)
        sum(x.square().mean() for x in (bev, action, description)).backward()
        blind = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
        unused = {n for n in blind if faithful and head == "onlybev" and "text.scene." in n}
        assert blind == unused, (refiner, head)
        if head == "unified_v3" and faithful:  # one key: what is asked makes no difference
            continue
        flat = {
            n for n, p in model.named_parameters()
            if p.grad is not None and not p.grad.abs().max() > 0
        }  # fmt: skip
        assert not flat, (refiner, head, flat)


@pytest.mark.parametrize("backbone", ["effb0", "mobilenetv3_small_050", "resnet18"])
def test_backbones_of_timm(backbone):
    for depth in DEPTHS:
        model = small(backbone=backbone, depth=depth)
        outputs = (
            model(*example(model, 1, seed=1)) if depth != "v2" else model.eval()(*example(model))
        )
        assert [tuple(x.shape) for x in outputs] == [(1, 4, 16, 16), (1, 4), (1, 8)]


@pytest.mark.parametrize("settings", [
    {"text_head": "unified_v3"}, BASELINE | {"backbone": "vov19"}
])  # fmt: skip
def test_checkpointing_changes_no_number(settings):
    """Outputs, gradients and running statistics, with dropout on."""
    results = []
    for again in (False, True):
        model = small(checkpointing=again, **settings | {"dropout": 0.3})
        torch.manual_seed(1)
        outputs = model(*example(model, 2))
        sum(x.square().mean() for x in outputs).backward()
        results.append([*outputs, *(p.grad for p in model.parameters()), *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_any_batch_and_flat_images():
    """No batch size is built in; images may come as (B*N, 3, H, W)."""
    model = small(text_head="unified_v3").eval()
    inputs = example(model, 3)
    with torch.no_grad():
        whole = model(*inputs)
        flat = model(inputs[0].flatten(0, 1), *inputs[1:])
        single = model(*(x[1:2] for x in inputs))
    for a, b, c in zip(whole, flat, single, strict=True):
        assert torch.equal(a, b) and torch.allclose(a[1:2], c, atol=1e-5)


def test_twin():
    model = small(text_head="bev_txt")
    assert build(**model.config).state_dict().keys() == model.state_dict().keys()


def test_groups_hold_each_parameter_once():
    for settings in ({}, BASELINE | {"backbone": "resnet18"}, {"pretrain": True}):
        model = small(**settings)
        found = [
            p for group in module_groups(model).values() for m in group for p in m.parameters()
        ]
        assert len(found) == len({id(p) for p in found}) == len(list(model.parameters()))


def test_parts_give_what_the_whole_gives():
    """Each part, run on what it was given, hands the next what that was given."""
    model = small().eval()
    inputs = example(model)
    found = {name: (part, given) for name, part, given in parts(model, inputs)}
    assert list(found) == ["backbone", "depth", "splat", "bev_encoder", "refiner", "text_head"]
    with torch.no_grad():
        answers = {name: part(*given) for name, (part, given) in found.items()}
        whole = model(*inputs)
    assert torch.equal(answers["backbone"][1], found["depth"][1][1])
    assert torch.equal(answers["depth"][0], found["splat"][1][0])
    assert torch.equal(answers["splat"], found["bev_encoder"][1][0])
    assert torch.equal(answers["bev_encoder"][0], whole[0])
    assert torch.equal(answers["text_head"][1], whole[2])


# --- what the published maths does, and what ours does ---


def test_sine_encoding():
    code = sine_encoding(3, 3, 16)[2]  # row 0, column 2
    wanted = [0, 1] * 4 + [0, 1, 0.5878, 0.8090, 0.0628, 0.9980, 0.0063, 1.0]
    assert torch.allclose(code, torch.tensor(wanted), atol=1e-4)
    assert sine_encoding(1, 1, 8).isfinite().all()


def copying(layer: DeformLayer) -> DeformLayer:
    """The layer, with offsets of zero and projections that change nothing."""
    attention = layer.self_attn
    with torch.no_grad():
        attention.sampling_offsets.bias.zero_()
        for projection in (attention.value_proj, attention.output_proj):
            projection.weight.copy_(torch.eye(len(projection.weight)))
    return layer


def attended(layer: DeformLayer, x: torch.Tensor) -> torch.Tensor:
    tokens, (height, width) = x.flatten(2).mT, x.shape[2:]
    with torch.no_grad():
        out = layer.self_attn(tokens, layer.reference(height, width), tokens, [(height, width)])
    return out.mT.unflatten(2, (height, width))


def test_attention_of_zero_offsets_is_the_identity():
    for size in ((5, 5), (4, 9), (1, 3)):
        x = torch.randn(2, 8, *size)
        assert torch.allclose(attended(copying(DeformLayer(8, 2, 4)), x), x, atol=1e-6)


def test_published_reference_points():
    """A quarter at the corners, half along the edges; a ramp that ends at half its height."""
    layer = copying(DeformLayer(8, 2, 4, faithful=True))
    ones = attended(layer, torch.ones(1, 8, 6, 6))[0, 0]
    edge = torch.tensor([0.5, 1, 1, 1, 1, 0.5])
    assert torch.allclose(ones, edge[:, None] * edge, atol=1e-6)
    ramp = torch.arange(10.0).expand(1, 8, 10, 10)
    row = attended(layer, ramp)[0, 0, 5]
    wanted = torch.tensor([0, 0.611, 1.722, 8.389, 4.5])
    assert torch.allclose(row[[0, 1, 2, 8, 9]], wanted, atol=1e-3)


def test_places_outside_the_map():
    """Ours may look beyond the edge, where there is nothing; the published layer stays on it."""
    for faithful, lowest in ((False, 0.0), (True, 0.5)):
        layer = copying(DeformLayer(8, 2, 4, faithful=faithful))
        layer.self_attn.sampling_offsets.bias.data.view(2, 4, 2)[..., 0] = -20.0
        out = attended(layer, torch.ones(1, 8, 7, 7))[0, 0, 3, 3]
        assert torch.allclose(out, torch.tensor(lowest), atol=1e-6)


def test_layer_is_not_square():
    layer = DeformLayer(16, 4, 2, 32)
    assert layer(torch.randn(2, 16, 10, 20)).shape == (2, 16, 10, 20)
    with pytest.raises(ValueError, match="dim=6"):
        DeformLayer(6, 2)


def test_relu_before_the_softmax():
    for faithful in (False, True):
        model = small(faithful=faithful)
        fine, coarse = model.camera.trunk(example(model)[0][0])
        lowest = model.camera.head.depth_net(fine, coarse).min()
        assert lowest == 0 if faithful else lowest < 0
    depth = model.depth(example(model)[0])
    assert depth.shape == (1, 6, 41, 4, 6) and torch.allclose(depth.sum(2), torch.tensor(1.0))


def test_one_key_says_the_same_to_each_camera():
    """Attention over a map's mean cannot tell the cameras apart; over its parts it can."""
    for faithful in (True, False):
        fusion = small(text_head="unified_v3", faithful=faithful).text.bev_fusion.eval()
        said = []
        fusion.cross_attn.register_forward_hook(
            lambda _, inputs, out, said=said: said.append(out[0])
        )
        channels = fusion.norm.normalized_shape[0]
        with torch.no_grad():
            fusion(9 * torch.randn(1, 6, channels), 9 * torch.randn(1, channels, 16, 16))
        same = torch.allclose(said[0], said[0][:, :1].expand_as(said[0]), atol=1e-6)
        assert same == faithful


@pytest.mark.parametrize("settings, cut", [
    (BASELINE | {"backbone": "vov19"}, True), ({"text_head": "bev_txt"}, False),
    ({"text_head": "mlp"}, False), ({"text_head": "mlp", "bev_detach": True}, True),
    ({"text_head": "onlybev"}, False), ({"text_head": "onlybev", "bev_detach": True}, True),
    ({"text_head": "unified_v3"}, False), ({"text_head": "unified_v3", "bev_detach": True}, True),
])  # fmt: skip
def test_detach(settings, cut):
    """Whether actions and descriptions change the map; by default as published for that head."""
    model = small(**settings)
    _, action, description = model(*example(model, 2))
    (action.square().mean() + description.square().mean()).backward()
    reached = any(p.grad is not None for p in model.bev_encoder.parameters())
    assert reached != cut


def test_baseline_reads_the_cameras_that_it_should():
    """Four descriptions and all actions come from the front, one each from four side cameras."""
    model = small(**BASELINE | {"backbone": "vov19"}, bev_detach=True).eval()
    images, *rest = example(model)
    with torch.no_grad():
        _, action, description = model(images, *rest)
        scores = torch.cat((action, description), 1)
        model.lift.register_forward_hook(lambda *_: torch.zeros(1, model.config["camC"], 16, 16))
        before = torch.cat(model(images, *rest)[1:], 1)
        seen = []
        for camera in range(6):
            changed = images.clone()
            changed[:, camera] += 5
            after = torch.cat(model(changed, *rest)[1:], 1)
            seen.append((after != before)[0].nonzero().flatten().tolist())
    assert scores.shape == (1, 12)
    front_left, front, front_right, back_left, back, back_right = seen
    assert front == list(range(8)) and back == []
    assert (front_left, back_left, front_right, back_right) == ([8], [9], [10], [11])


# --- sizes ---


@pytest.mark.parametrize("settings, size, fits", [
    ({"backbone": "vov39"}, (112, 308), True),
    ({"backbone": "vov39", "depth": "v1_c3"}, (100, 310), True),
    ({"backbone": "vov39", "text_head": "bev_txt"}, (112, 308), True),
    ({"backbone": "vov39", "faithful": True}, (112, 308), False),
    ({"backbone": "effb0", "depth": "v1_joint"}, (112, 308), False),
    ({"backbone": "effb0", "depth": "v1_joint"}, (96, 256), True),
    ({"backbone": "effb0"}, (112, 320), True),
    ({"backbone": "effb4", "depth": "v1_joint", "text_head": "bev_txt"}, (112, 308), False),
    ({"backbone": "vov39", "depth": "v1_joint"}, (112, 320), False),
])  # fmt: skip
def test_image_sizes(settings, size, fits):
    own = settings | {"final_h": size[0], "final_w": size[1]}
    if not fits:
        with pytest.raises(ValueError, match="multiples of (16|32).* use "):
            small(**own)
        return
    model = small(**own).eval()
    with torch.no_grad():
        assert model(*example(model))[0].shape == (1, 4, 16, 16)


def test_places_of_odd_sizes():
    """A point in space falls on the right feature pixel where the picture is no multiple of 16."""
    model = small(final_h=100, final_w=310)
    points = model.lift.u, model.lift.v
    assert [len(p) for p in points] == [20, 7] or [len(p) for p in points] == [19, 6]
    for p in points:
        assert p[0] == 7.5 and torch.allclose(p.diff(), torch.tensor(16.0))


@pytest.mark.parametrize("refiner", REFINERS)
def test_any_grid(refiner):
    """Cells in any number, along each axis another one; what is beyond the grid changes nothing."""
    grid = {**DEMO["grid_conf"], "xbound": [-30.0, 30.0, 6.0], "ybound": [-42.0, 48.0, 6.0]}
    model = small(refiner=refiner, grid_conf=grid).eval()
    with torch.no_grad():
        assert model(*example(model))[0].shape == (1, 4, 10, 15)


# --- wrong settings ---


@pytest.mark.parametrize("settings, said", [
    ({"backbone": "vov98"}, "vov98"),
    ({"depth": "v3"}, "depth='v3'"),
    ({"refiner": "deformer"}, "refiner='deformer'.*deform"),
    ({"text_head": "unified"}, "text_head='unified'"),
    ({"width": 0.0}, "width=0.0"),
    ({"bev_width": -1.0}, "bev_width=-1.0"),
    ({"dropout": 1.0}, "dropout=1.0"),
    ({"outC": 0}, "outC=0"),
    ({"camC": 0}, "camC=0"),
    ({"cams": ()}, "cams"),
    ({"cams": ("CAM_FRONT", "CAM_FRONT")}, "cams"),
    ({"cams": CAMERAS[:3], "text_head": "bev_txt"}, "CAM_BACK_LEFT"),
    ({"refiner": "resnet18", "text_head": "unified_v3"}, "unified_v3"),
    ({"grid_conf": {"xbound": [0.0, 1.0, 1.0]}}, "grid_conf has"),
    ({"backbone": "resnet18", "backbone_weights": "x.pth"}, "backbone_weights"),
])  # fmt: skip
def test_wrong_settings(settings, said):
    with pytest.raises(ValueError, match=said) as error:
        small(**settings)
    assert "\n" not in str(error.value)


def test_wrong_inputs():
    model = small()
    imgs, *cameras = example(model)
    with pytest.raises(ValueError, match="imgs has shape"):
        model(imgs[..., :-1], *cameras)
    with pytest.raises(ValueError, match="intrins holds a NaN"):
        model(imgs, *cameras[:2], cameras[2] * float("nan"), *cameras[3:])
    with pytest.raises(ValueError, match="5 cameras.*built for 6"):
        model(imgs[:, :5], *(x[:, :5] for x in cameras))


def test_pretraining_takes_any_number_of_cameras():
    model = small(pretrain=True).eval()
    imgs, *cameras = example(model)
    with torch.no_grad():
        bev, action, description = model(imgs[:, :2], *(x[:, :2] for x in cameras))
    assert bev.shape == (1, 4, 16, 16) and action is None and description is None


# --- the published names ---

ORIGINAL = {  # ours: theirs, as found in the published code
    "camera.trunk.stem.1.bn.weight": "backbone.backbone.stem_1.bn.weight",
    "camera.trunk.stages.3.blocks.0.attn.fc.weight":
        "backbone.backbone.stages_3.blocks.0.attn.fc.weight",
    "camera.head.depth_net.fusion.1.bias": "depth_net.fusion.1.bias",
    "camera.head.feat_proj.bias": "cam_encode.feat_proj.bias",
    "bev_encoder.refiner.norm2.weight": "bev_encoder.transformer.encoder.norm2.weight",
    "bev_encoder.seg_head.6.bias": "bev_encoder.seg_head.6.bias",
    "bev_encoder.compress.0.weight": "bev_encoder.compress.0.weight",
    "text.bev_post.post.0.weight": "bev_post.post.0.weight",
    "text.action_head.6.bias": "action_head.6.bias",
    "text.adapter.3.weight": "vovnet_adapter.adapter.3.weight",
    "text.scene.convs.4.1.weight": "sceneunder.0.convs.4.1.weight",
    "text.front.linear.bias": "embeder_f2.1.bias",
    "text.side.conv.0.weight": "embeder_lr1.0.weight",
    "text.front_desc.bias": "predictorf1.0.bias",
    "text.action.bias": "predictorf2.0.bias",
    "text.side_desc.bias": "predictorlr.0.bias",
    "text.feature_pyramid.scale2.0.bias": "feature_pyramid.scale2.0.bias",
    "text.camera_transformer.cam_embed.weight": "camera_transformer.cam_embed.weight",
    "text.bev_fusion.cross_attn.in_proj_weight": "bev_fusion.cross_attn.in_proj_weight",
    "text.unified_predictor.camera_weights": "unified_predictor.camera_weights",
    "camera.head.up1.conv.3.weight": "encoder.up1.conv.3.weight",
    "camera.head.depthnet.bias": "camencode.depthnet.bias",
    "bev_encoder.layer2.0.downsample.0.weight": "bevencode.layer2.0.downsample.0.weight",
    "camera.trunk.network.blocks.1.0.conv_pw.weight": "encoder.trunk._blocks.2._expand_conv.weight",
}  # fmt: skip


def test_original_names():
    """Known names, and that every one of them exists in a model of ours."""
    theirs = {name: torch.zeros(1) for name in ORIGINAL.values()}
    blocks = {f"encoder.trunk._blocks.{n}._bn1.bias": torch.zeros(1) for n in range(32)}
    assert set(ORIGINAL) <= convert_original(theirs | blocks).keys()
    models = [counted(text_head=head) for head in ("mlp", "bev_txt", "unified_v3")]
    own = {name for m in (*models, counted(**BASELINE)) for name in m.state_dict()}
    assert set(ORIGINAL) <= own


def test_original_file_loads(tmp_path):
    """A file with the keys and names of the published training gives the same answers."""
    model = small(faithful=True, text_head="unified_v3").eval()
    theirs = {}
    for name, value in model.state_dict().items():
        for ours, original in (
            ("camera.trunk.stem.", "backbone.backbone.stem_"),
            ("camera.trunk.stages.", "backbone.backbone.stages_"),
            ("camera.head.depth_net.", "depth_net."), ("camera.head.", "cam_encode."),
            ("bev_encoder.refiner.", "bev_encoder.transformer.encoder."),
            ("text.scene.", "sceneunder.0."), ("text.", ""),
        ):  # fmt: skip
            if name.startswith(ours):
                name = original + name.removeprefix(ours)
                break
        theirs[name] = value
    path, stages = tmp_path / "best_model.pth", tmp_path / "best_pretrained.pth"
    torch.save({"epoch": 5, "model_state_dict": theirs | {"camera_ids": torch.arange(6)},
                "best_miou": 0.5, "val_info": {"iou": [0.5] * 4}}, path)  # fmt: skip
    inputs, loaded = example(model), {}
    for faithful in (True, False):
        loaded[faithful] = build(**model.config | {"faithful": faithful}, weights=str(path)).eval()
    with torch.no_grad():
        wanted, got = model(*inputs), loaded[True](*inputs)
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
    assert torch.equal(
        loaded[False].text.scene.project[0].weight, model.text.scene.project[0].weight
    )
    pre = {"epoch": 3, "lss_version": "v2", "miou": 0.4}
    for part in ("backbone", "depth_net", "cam_encode", "bev_encoder"):
        state = {
            n.removeprefix(f"{part}."): v for n, v in theirs.items() if n.startswith(f"{part}.")
        }
        pre[f"{part}_state_dict"] = state
    torch.save(pre, stages)
    fresh = build(**model.config)
    assert load_pretrained(fresh, stages) == ["text"]
    same = [torch.equal(a, b) for a, b in zip(
        fresh.state_dict().values(), model.state_dict().values(), strict=True
    )]  # fmt: skip
    names = list(model.state_dict())
    assert all(s for s, n in zip(same, names, strict=True) if not n.startswith("text."))


def test_two_stages(tmp_path):
    """The map's part is handed on; a depth head of another version keeps its weights."""
    first, path = small(pretrain=True, depth="v1_c3"), tmp_path / "first.pth"
    torch.save({"state_dict": first.state_dict()}, path)
    torch.manual_seed(5)
    second = build(**first.config | {"pretrain": False})
    text = second.text.action_head[0].weight.clone()
    assert load_pretrained(second, path) == ["text"]
    assert torch.equal(second.text.action_head[0].weight, text)
    own = second.state_dict()
    assert all(torch.equal(own[n], v) for n, v in first.state_dict().items())
    torch.manual_seed(6)
    other = build(**first.config | {"pretrain": False, "depth": "v2"})
    kept = other.camera.head.depth_net.depth_c3[0].weight.clone()
    assert load_pretrained(other, path) == ["text", "depth_net"]
    assert torch.equal(other.camera.head.depth_net.depth_c3[0].weight, kept)
    assert torch.equal(other.camera.head.feat_proj.weight, first.camera.head.feat_proj.weight)
    with pytest.raises(ValueError, match="first.pth: .*build with the same settings"):
        load_pretrained(build(**first.config | {"refiner": "conv"}), path)


@pytest.mark.parametrize("break_it, said", [
    (lambda w: w | {"text.action_head.6.bias": torch.zeros(3)}, "text.action_head.6.bias"),
    (lambda w: {n: v for n, v in w.items() if "compress" not in n}, "compress"),
    (lambda w: w | {"camera.head.feat_proj.bias": w["camera.head.feat_proj.bias"] * float("nan")},
     "NaN"),
])  # fmt: skip
def test_weights_that_do_not_fit(tmp_path, break_it, said):
    model, path = small(), tmp_path / "model.pth"
    torch.save(break_it(model.state_dict()), path)
    with pytest.raises(ValueError, match=f"model.pth.*{said}"):
        build(**model.config, weights=str(path))


def test_weights_of_another_grid(tmp_path):
    model, path = small(faithful=True), tmp_path / "model.pth"
    torch.save(model.state_dict(), path)
    grid = model.config["grid_conf"] | {"xbound": [-40.0, 56.0, 6.0]}
    with pytest.raises(ValueError, match="another grid"):
        build(**model.config | {"grid_conf": grid}, weights=str(path))


# --- factories ---


def test_guide_call():
    """The guide's call, once its syntax error is mended, and the baseline's three."""
    grid = DEMO["grid_conf"]
    aug = {"final_dim": (64, 96), "cams": list(CAMERAS), "Ncams": 6, "H": 900, "W": 1600}
    with pytest.raises(SyntaxError):
        compile("f(bsize=1, grid_conf, data_aug_conf, outC=4)", "guide", "eval")
    model = compile_model_vovnet_transformer(
        1, grid, aug, outC=4, vovnet_type="vovnet39", width=0.1
    )
    assert (model.config["depth"], model.config["refiner"]) == ("v2", "deform")
    with torch.no_grad():
        bev_seg, action, desc = model.eval()(*example(model))
    assert (bev_seg.shape[1], action.shape, desc.shape) == (4, (1, 4), (1, 8))
    own = {"backbone": "resnet18", "width": 0.1}
    assert compile_model_bevtxt(1, grid, aug, 4, **own).config["text_head"] == "bev_txt"
    assert compile_model_onlybev(1, grid, aug, 4, **own).config["text_head"] == "onlybev"
    assert compile_model_lss(1, grid, aug, 4, **own).text is None
    v1 = compile_model_vovnet_transformer(
        1, grid, aug, vovnet_type="vovnet57", lss_version="v1", width=0.1
    )
    assert v1.config["depth"] == "v1_c3"
    for wrong, said in (
        ({"vovnet_type": "vovnet98"}, "vovnet_type='vovnet98'"),
        ({"lss_version": "v3"}, "lss_version='v3'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            compile_model_vovnet_transformer(1, grid, aug, **wrong)
    with pytest.raises(ValueError, match="final_dim"):
        compile_model_bevtxt(1, grid, {"cams": CAMERAS}, 4)


# --- the published maths beside ours ---


@pytest.mark.parametrize("settings", [
    {"text_head": "unified_v3"}, {"refiner": "conv", "depth": "v1_c3"},
    BASELINE | {"backbone": "mobilenetv3_small_050"},
])  # fmt: skip
def test_published_maths_gives_the_same(settings):
    from leansense.xad.peers import PublishedNet

    model = small(**settings)
    published, inputs = PublishedNet(model), example(model, 2)
    for net in (model, published):
        net.train()
        sum(x.square().mean() for x in net(*inputs)).backward()
    theirs = dict(published.inner.named_parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        wanted = theirs[name].grad
        apart = (parameter.grad - wanted).norm()  # a ReLU close to its bend may fall otherwise
        assert float(apart) < 3e-2 * max(float(wanted.norm()), 1e-3), name
    with torch.no_grad():
        for net in (model, published):
            net.eval()
        for a, b in zip(model(*inputs), published(*inputs), strict=True):
            assert float((a - b).abs().max()) < 1e-3 * float(b.abs().max())


def test_published_maths_is_for_plain_models():
    from leansense.xad.peers import PublishedNet

    for name in ("faithful", "checkpointing"):
        with pytest.raises(ValueError, match=f"{name}=True"):
            PublishedNet(small(**{name: True}))


def test_efficientnet_names():
    """Blocks are counted through there and by stages here."""
    names = ["_blocks.0._bn1.bias", "_blocks.2._bn0.weight", "_blocks.31._bn2.bias", "_bn1.bias"]
    found = from_efficientnet_pytorch(dict.fromkeys(names, 0), (2, 4, 4, 6, 6, 8, 2))
    assert list(found) == ["network.blocks.0.0.bn1.norm.bias", "network.blocks.1.0.bn1.norm.weight",
                           "network.blocks.6.1.bn3.bias", "head.bn2.bias"]  # fmt: skip
