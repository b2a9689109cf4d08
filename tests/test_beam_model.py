"""Beam's networks: stated counts, the published maths and its dead fusion, the repaired one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leansense.beam.missing import MODALITIES, drop_at_random, fill, hide, make_noise
from leansense.beam.model import (
    AttentionBlock,
    BimambaBlock,
    Encoder,
    build,
    count_declared,
    count_instantiated,
    example,
    load_weights,
    swap_channels,
    trace_signal,
)
from leansense.beam.peers import PlainMamba, published_scan, time_parts, use_plain_scan
from leansense.layers.scan import Mamba, selective_scan

TINY = dict(width=8, size=32, anchors=2, n_layer=2, image_depth=18, seq_len=2, dropout=0.0)


def tiny(seed=0, arch="mambafusion", **settings):
    torch.manual_seed(seed)
    return build(arch, **TINY | settings)


def counts(*arch, **settings):
    with torch.device("meta"):
        model = build(*arch, **settings)
    return count_declared(model), count_instantiated(model)


def loss_of(model, batch):
    return F.binary_cross_entropy_with_logits(model(batch), batch["target"])


# --- stated numbers


@pytest.mark.parametrize(
    "settings, declared",
    [
        ({}, 103_461_924),
        ({"modality_missing": "radar"}, 92_288_548),
        ({"modality_missing": "lidar"}, 92_291_684),
        ({"modality_missing": "image"}, 82_177_252),
        ({"modality_missing": "lidar_radar"}, 81_118_308),
        ({"faithful": True}, 103_461_924),
        ({"TFM": "sum"}, 103_461_924),
        ({"FFM": "bimamba", "TFM": "mamba"}, 103_461_888),
        ({"FFM": "mamba", "TFM": "mamba"}, 64_846_848),
        ({"arch": "transfuser", "TFM": "sum"}, 78_422_528),
        ({"arch": "transfuser", "TFM": "sum", "modality_missing": "image"}, 57_137_856),
        ({"arch": "transfuser", "TFM": "mamba"}, 80_117_248),
        ({"arch": "transfuser"}, 80_117_284),
        ({"arch": "transfuser", "TFM": "sum", "seq_len": 20, "pred_len": 5}, 81_216_448),
        ({"arch": "transfuser", "TFM": "sum", "seq_len": 10, "pred_len": 5}, 79_373_248),
        ({"FFM": "mamba", "TFM": "mamba", "seq_len": 20, "pred_len": 5}, 67_640_768),
        ({"FFM": "bimamba", "TFM": "mamba", "seq_len": 10, "pred_len": 5}, 119_158_208),
        ({"arch": "position"}, 29_312),
    ],
)
def test_declared_counts(settings, declared):
    settings = dict(settings)
    assert counts(settings.pop("arch", "mambafusion"), **settings)[0] == declared


def test_instantiated_counts_shrink_with_the_tokens():
    cells = 5 * 64 * (64 + 128 + 256 + 512)  # tokens of one sensor times channels, all levels
    declared, built = counts(modalities="image lidar")
    assert declared == 92_288_548
    assert declared - built == cells * (1 + 2 * 8)  # positions, and weight and bias of 8 norms
    assert counts(TFM="sum")[1] == 101_767_168
    declared, built = counts("transfuser", TFM="sum", modalities="lidar radar")
    assert (declared, built) == (57_137_856, 57_137_856 - cells)
    assert counts(norm="token")[1] == 103_461_924 - 8 * 2 * 961 * 960


def test_counts_of_the_parts():
    with torch.device("meta"):
        model = build(pred_len=5)
    parts = [count_instantiated(encoder) for encoder in model.encoders.values()]
    assert parts == [21_284_672, 11_170_240, 11_173_376]
    levels = [count_instantiated(level) for level in model.levels]
    assert levels == [1_635_584, 4_221_440, 12_243_968, 39_692_288]
    assert [count_instantiated(level.blocks[0]) for level in model.levels] == [
        196_736,
        512_256,
        1_499_648,
        4_899_840,
    ]
    assert [count_instantiated(linear) for linear in model.gps] == [192, 8_320, 33_024, 131_584]
    assert count_instantiated(model.time) == 1_694_756
    assert count_instantiated(model.join) == 172_480
    assert count_instantiated(model.steps) == 29_120
    with torch.device("meta"):
        baseline = build("transfuser", TFM="sum", add_velocity=0)
    assert [count_instantiated(level) for level in baseline.levels] == [
        461_568,
        1_709_568,
        6_564_864,
        25_712_640,
    ]
    assert count_instantiated(baseline.encoders["radar"]) == 11_170_240


# --- the block against its formulas


def scan_slowly(mamba, x):
    """A Mamba over x (B, T, C), token by token and channel by channel sums, from its parameters."""
    stream, z = mamba.in_proj(x).chunk(2, -1)
    taps, length = mamba.conv1d.weight.shape[-1], x.shape[1]
    A, out = -mamba.A_log.exp(), []
    state = x.new_zeros(len(x), mamba.d_inner, mamba.d_state)
    for t in range(length):
        u = mamba.conv1d.bias.expand_as(stream[:, 0]).clone()
        for k in range(taps):
            if t - k >= 0:
                u = u + mamba.conv1d.weight[:, 0, taps - 1 - k] * stream[:, t - k]
        u = u * torch.sigmoid(u)
        dt, B, C = mamba.x_proj(u).split([mamba.dt_rank, mamba.d_state, mamba.d_state], -1)
        delta = torch.log1p(torch.exp(mamba.dt_proj(dt)))
        state = torch.exp(delta[:, :, None] * A) * state
        state = state + (delta * u)[:, :, None] * B[:, None]
        y = (state * C[:, None]).sum(-1) + mamba.D * u
        out.append(y * z[:, t] * torch.sigmoid(z[:, t]))
    return mamba.out_proj(torch.stack(out, 1))


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize("norm", ["plane", "token"])
def test_bidirectional_block_is_its_formula(faithful, norm):
    torch.manual_seed(1)
    block = BimambaBlock(8, 11, norm, faithful).double()
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    shape = (11, 8) if norm == "plane" else (8,)
    u = block.fc1(F.layer_norm(x, shape, block.norm.weight, block.norm.bias))
    ahead = scan_slowly(block.ahead, u)
    behind = scan_slowly(block.behind, u.flip(1))
    gate = F.leaky_relu(block.fc2(u.flip(1)), 0.2)
    if faithful:
        want = behind * gate + ahead * behind
    else:
        behind, gate = behind.flip(1), gate.flip(1)
        want = x + behind * gate + ahead * behind
    torch.testing.assert_close(block(x), want, rtol=1e-9, atol=1e-12)


def test_attention_block_is_its_formula():
    torch.manual_seed(2)
    block, x = AttentionBlock(8, 0.0).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    y, heads = block.ln1(x), []
    for head in range(4):
        part = slice(2 * head, 2 * head + 2)
        q, k, v = (f(y)[..., part] for f in (block.query, block.key, block.value))
        heads.append((q @ k.mT / 2**0.5).softmax(-1) @ v)
    want = x + block.proj(torch.cat(heads, -1))
    want = want + block.mlp(block.ln2(want))
    torch.testing.assert_close(block(x), want)


def test_swap_takes_thirds_and_turns_back():
    x = torch.randn(2, 3, 4, 64)
    a, b = 21, 42
    image, lidar, radar = x.unbind(1)
    swapped = swap_channels(x)
    want = torch.cat([lidar[..., :a], radar[..., a:b], image[..., b:]], -1)
    assert torch.equal(swapped[:, 1], want)
    want = torch.cat([radar[..., :a], image[..., a:b], lidar[..., b:]], -1)
    assert torch.equal(swapped[:, 2], want)
    assert torch.equal(swap_channels(swapped, back=True), x)


def test_plain_scan_is_ours():
    torch.manual_seed(3)
    u, delta, z = torch.randn(3, 2, 9, 6).unbind(0)
    B, C, A = torch.randn(2, 9, 4), torch.randn(2, 9, 4), -torch.rand(6, 4)
    D, bias = torch.randn(6), torch.randn(6)
    ours = selective_scan(u, delta, A, B, C, D, z, bias, True)
    plain = published_scan(u.mT, delta.mT, A, B.mT, C.mT, D, z.mT, bias).mT
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("faithful", [True, False])
def test_whole_network_is_that_of_the_plain_scan(faithful):
    model = tiny(faithful=faithful).train()
    batch = example(model, 2)
    ours = torch.autograd.grad(loss_of(model, batch), model.parameters(), allow_unused=True)
    answer = model(batch)
    use_plain_scan(model)
    assert sum(isinstance(m, PlainMamba) for m in model.modules()) == 4 * 2 * 2 + 1
    torch.testing.assert_close(model(batch), answer, rtol=1e-3, atol=1e-4)
    plain = torch.autograd.grad(loss_of(model, batch), model.parameters(), allow_unused=True)
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-5)


def test_time_parts_leaves_the_network_as_it_was():
    model = tiny().eval()
    batch = example(model)
    with torch.no_grad():
        spent = time_parts(model, lambda: model(batch))
    assert set(spent) >= {"encoders.image", "levels", "scan", "conv", "mamba", "time", "total"}
    assert 0 < spent["scan"] <= spent["mamba"] <= spent["total"]
    assert not any("forward" in vars(m) or "stem" in vars(m) for m in model.modules())


# --- dead and alive


def gradients(model, batch):
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss_of(model, batch), [*parameters.values()], allow_unused=True)
    return dict(zip(parameters, found))


def test_published_fusion_is_dead():
    model = tiny(faithful=True, n_layer=8).train()
    batch = example(model, 2)
    found = gradients(model, batch)
    for level in range(4):
        names = [n for n in found if n.startswith(f"levels.{level}.")]
        alive = [n for n in names if found[n] is not None and bool(found[n].any())]
        assert len(names) == 195 and alive == [f"levels.{level}.ln_f.bias"]
    rows = trace_signal(model, batch)
    assert len(rows) == 4 * 8 and all(row["gradient"] == 0 for row in rows)
    assert all(row["std"] == 0.0 for row in rows if row["block"] == 7)
    model.eval()
    with torch.no_grad():
        moved = {**batch, "gps": batch["gps"] + torch.randn(2, 2, 2)}
        assert torch.equal(model(batch), model(moved))


@pytest.mark.parametrize("FFM", ["csbimamba", "bimamba", "mamba"])
def test_repaired_fusion_is_alive(FFM):
    model = tiny(n_layer=8, FFM=FFM, pred_len=5).train()
    batch = example(model, 2)
    # the gradient of a deeper layer-norm weight may be small, never zero
    found = gradients(model, batch)
    assert not [n for n, g in found.items() if g is None or not bool(g.any())]
    assert all(bool(g.isfinite().all()) for g in found.values())
    rows = trace_signal(model, batch)
    assert min(row["std"] for row in rows) > 1e-3 and min(row["gradient"] for row in rows) > 1e-9


@pytest.mark.parametrize("arch, TFM", [("mambafusion", "attenmamba"), ("transfuser", "sum")])
def test_every_sensor_changes_the_answer(arch, TFM):
    model = tiny(arch=arch, TFM=TFM)
    batch = example(model, 3)
    model.train()
    model(batch)  # batch-norm statistics
    model.eval()
    with torch.no_grad():
        answer = model(batch)
        assert torch.equal(answer, model(batch))
        for name in MODALITIES:
            other = hide(batch, name)
            assert not torch.allclose(answer, model(other), atol=1e-6)
            one = hide(batch, name, frames=[1])
            assert not torch.allclose(answer, model(one), atol=1e-7)
            assert not torch.equal(model(one), model(other))
        moved = {**batch, "gps": batch["gps"].flip(0)}
        assert not torch.allclose(answer, model(moved), atol=1e-6)


def test_published_initialisation_overwrites_mambas_own():
    repaired, published = tiny(), tiny(faithful=True)
    for model, native in ((repaired, True), (published, False)):
        mamba = model.levels[0].blocks[0].ahead
        step = F.softplus(mamba.dt_proj.bias)
        assert bool((step < 0.11).all()) is native
        assert bool((mamba.dt_proj.bias == 0).all()) is not native
    block = tiny(faithful=True, width=64, n_layer=1, modalities="").levels[2].blocks[0]
    for layer in (block.fc1, block.fc2, block.ahead.in_proj, block.behind.out_proj):
        assert abs(float(layer.weight.detach().std()) - 0.02) < 0.002
    assert bool((block.norm.weight == 1).all()) and bool((block.fc1.bias == 0).all())
    time_mamba = published.time.mamba  # outside the fusion: its own initialisation
    assert bool((time_mamba.dt_proj.bias != 0).all())


def test_twenty_frames_train_without_a_non_finite_value():
    model = tiny(seq_len=20, pred_len=5, anchors=1, image_depth=18).train()
    batch = example(model, 2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-4)
    losses = []
    for _ in range(4):
        loss = loss_of(model, batch)
        optimiser.zero_grad()
        loss.backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and model(batch).shape == (2, 5, 64)


# --- sensors that are not there


@pytest.mark.parametrize(
    "settings",
    [
        {"modalities": "image"},
        {"modalities": "radar lidar"},
        {"modalities": ""},
        {"seq_len": 1},
        {"seq_len": 1, "modalities": "lidar", "arch": "transfuser", "TFM": "sum"},
        {"arch": "position"},
        {"arch": "position", "pred_len": 5},
        {"add_velocity": 0, "FFM": "bimamba", "TFM": "mamba"},
        {"norm": "token", "TFM": "sum"},
        {"size": 40, "anchors": 3},
    ],
)
def test_every_small_network_trains(settings):
    model = tiny(**settings).train()
    batch = example(model, 2)
    found = gradients(model, batch)
    still = [n for n, g in found.items() if g is None or not bool(g.any())]
    if settings.get("seq_len") == 1 and "arch" not in settings:  # one frame: no past, no choice
        assert set(still) <= {"time.mamba.A_log", "time.weigh.weight", "time.weigh.bias"}
    else:
        assert not still


def test_built_sensors_alone_are_read():
    model = tiny(modalities="radar").eval()
    batch = example(model, 2)
    with torch.no_grad():
        answer = model(batch)
        for name in ("image", "lidar"):
            assert torch.equal(answer, model({n: v for n, v in batch.items() if n != name}))
    assert set(model.encoders) == {"radar"} and len(model.levels[0].pos_emb[0]) == 2 * 4 + 2


@pytest.mark.parametrize("kind", ["zerolike", "randlike", "token"])
def test_absent_input_is_never_read(kind):
    model = tiny(modality_missing_type=kind).eval()
    batch = hide(example(model, 3), "image lidar", frames=[0])
    junk = {**batch}
    for name in ("image", "lidar"):
        junk[name] = batch[name].clone()
        junk[name][:, 0] = 7
    with torch.no_grad():
        answer = model(batch)
        assert torch.equal(answer, model(junk))
        declared = tiny(modality_missing_type=kind, modality_missing="radar").eval()
        declared.load_state_dict(model.state_dict())
        assert torch.equal(declared(batch), model(hide(batch, "radar")))


def test_filling_follows_the_normalisation():
    model = tiny(modality_missing="image").eval()
    batch = example(model, 1)
    zeros = torch.zeros(2, 3, 32, 32)
    assert torch.equal(model.layer1(batch)["image"], model.encoders["image"].stem(zeros))
    grey = torch.full((1, 2, 3, 4, 4), 255, dtype=torch.uint8)
    want = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(model.normalise("image", grey)[0, 0, :, 0, 0], want)


def test_noise_belongs_to_the_sample():
    model = tiny(modality_missing_type="randlike", modality_missing="radar").eval()
    batch = example(model, 3)
    alone = {k: v[2:] for k, v in batch.items()}
    with torch.no_grad():
        both = model(batch)
        torch.testing.assert_close(both[2:], model(alone), rtol=1e-4, atol=1e-5)
        assert not torch.equal(both, tiny(**model_settings(model, noise_seed=1))(batch))
    a, b = make_noise((1, 1, 4, 4), ["x", "y"], 0, "radar")
    assert not torch.equal(a, b) and not torch.equal(a, make_noise((1, 1, 4, 4), ["x"], 0, "l")[0])
    assert 0 <= float(a.min()) and float(a.max()) < 1
    model.train()
    torch.manual_seed(5)
    first = model.layer1(batch)["radar"]
    assert not torch.equal(first, model.layer1(batch)["radar"])  # fresh noise each step
    torch.manual_seed(5)
    torch.testing.assert_close(first, model.layer1(batch)["radar"])


def model_settings(model, **other):
    kept = {n: v for n, v in model.config.items() if n not in TINY and n != "arch"}
    return kept | other


def test_learned_token_takes_the_place_of_the_map():
    model = tiny(modality_missing_type="token")
    assert count_instantiated(model) == count_instantiated(tiny()) + 3 * 8
    batch = hide(example(model, 2), "lidar", frames=[1])
    maps = model.layer1(batch)["lidar"].view(2, 2, 8, 8, 8)
    token = model.missing_token[1].view(8, 1, 1).expand(8, 8, 8)
    assert torch.equal(maps[0, 1], token) and not torch.equal(maps[0, 0], token)
    gradient = gradients(model, hide(batch, "lidar"))
    assert bool(gradient["missing_token"][1].any()) and not bool(gradient["missing_token"][0].any())


def test_dropping_at_random_keeps_a_sensor():
    batch = {"gps": torch.zeros(2000, 2, 2), "present": torch.ones(2000, 3, 4, dtype=torch.bool)}
    dice = torch.Generator().manual_seed(0)
    left = drop_at_random(batch, 0.5, generator=dice)["present"]
    assert bool(left.any(2).any(1).all()) and torch.equal(left.any(2), left.all(2))
    assert abs(float((~left.any(2)).float().mean()) - (0.5 - 0.125 / 3)) < 0.02
    again = drop_at_random(batch, 0.5, generator=torch.Generator().manual_seed(0))["present"]
    assert torch.equal(left, again)
    single = drop_at_random(batch, 0.0, 0.25, torch.Generator().manual_seed(1))["present"]
    assert abs(float(single.float().mean()) - 0.75) < 0.02
    never = {**batch, "present": torch.zeros_like(left)}
    assert not bool(drop_at_random(never, 0.5)["present"].any())  # absent stays absent
    batch["present"][:, 0] = False  # and is not what is left
    left = drop_at_random(batch, 0.5)["present"]
    assert bool(left.any(2).any(1).all()) and not bool(left[:, 0].any())


def test_fill_leaves_present_frames_alone():
    maps, present = torch.rand(2, 3, 1, 4, 4), torch.tensor([[1, 0, 1], [0, 0, 1]]).bool()
    for kind in ("zerolike", "randlike"):
        out = fill(maps, present, kind, "radar", ["a", "b"])
        assert torch.equal(out[present], maps[present])
        assert bool((out[~present] != maps[~present]).all())


# --- files and errors


def test_backbone_weights_from_files(tmp_path):
    from torchvision.models import resnet18

    torch.manual_seed(8)
    image, maps = resnet18(), resnet18()
    for name, net in (("image", image), ("maps", maps)):
        torch.save(net.state_dict(), tmp_path / f"{name}.pth")
    files = {"weights": str(tmp_path / "image.pth"), "map_weights": str(tmp_path / "maps.pth")}
    small = dict(size=32, anchors=1, n_layer=1, seq_len=1, FFM="mamba", TFM="sum")
    model = build(image_depth=18, modalities="image radar", **small, **files).eval()
    picture = torch.randn(1, 3, 32, 32)
    image.fc = nn.Identity()
    want = image.eval()(picture)
    found = model.encoders["image"](picture).mean((2, 3))
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
    assert torch.equal(model.encoders["radar"].layer4[1].conv2.weight, maps.layer4[1].conv2.weight)
    assert model.encoders["radar"].conv1.weight.shape[1] == 2
    with pytest.raises(ValueError, match=r"maps\.pth: weights of another model: layer1\.2"):
        build(modalities="image", weights=str(tmp_path / "maps.pth"), **small)


def test_checkpoint_of_another_network_is_named(tmp_path):
    file, model = tmp_path / "model.pt", tiny()
    torch.save({"state_dict": {f"model.{n}": v for n, v in model.state_dict().items()}}, file)
    twin = load_weights(tiny(seed=9), file)
    batch = example(model, 1)
    assert torch.equal(model.eval()(batch), twin.eval()(batch))
    for settings in ({"FFM": "mamba"}, {"arch": "transfuser"}, {"arch": "position"}):
        with pytest.raises(ValueError, match=r"model\.pt: weights of another model: ") as error:
            load_weights(tiny(**settings), file)
        assert "\n" not in str(error.value)


WRONG = {
    "'lider' is no modality; nearest is 'lidar'": dict(modalities="image lider"),
    "nearest is 'radar'": dict(modality_missing="lidar_rader"),
    "twice": dict(modalities="image image"),
    "FFM='csbimanba' is unknown; nearest is 'csbimamba'": dict(FFM="csbimanba"),
    "TFM='atten' is unknown": dict(TFM="atten"),
    "arch='mamba' is unknown": dict(arch="mamba"),
    "modality_missing_type='zeros' is unknown": dict(modality_missing_type="zeros"),
    "the network has no radar": dict(modalities="image", modality_missing="radar"),
    "depth=50: choose from 10, 18, 34": dict(depth=50),
    "width=10: must be a multiple of 4": dict(width=10),
    "dropout=1.0": dict(dropout=1.0),
    "n_layer=0: must be at least 1": dict(n_layer=0),
    "contradicts faithful=True": dict(faithful=True, norm="token"),
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_settings_are_named(said):
    with pytest.raises(ValueError) as error:
        tiny(**WRONG[said])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_wrong_batches_are_named():
    model = tiny()
    batch = example(model, 2)
    with pytest.raises(ValueError, match=r"image has shape \(2, 1, 3, 32, 32\): needs \(B, 2, 3,"):
        model({**batch, "image": batch["image"][:, :1]})
    with pytest.raises(ValueError, match=r"radar has shape .*add_velocity"):
        model({**batch, "radar": batch["radar"][:, :, :1]})
    with pytest.raises(ValueError, match=r"gps has shape \(2, 1, 2\): needs \(B, 2, 2\)"):
        model({**batch, "gps": batch["gps"][:, :1]})
    with pytest.raises(ValueError, match="the batch holds no lidar"):
        model({n: v for n, v in batch.items() if n != "lidar"})


def test_encoder_is_torchvisions_at_its_width():
    from torchvision.models import resnet18

    reference, own = resnet18(), Encoder(18, 3)
    names = {n: v.shape for n, v in reference.state_dict().items() if not n.startswith("fc.")}
    assert names == {n: v.shape for n, v in own.state_dict().items()}
    assert isinstance(tiny().time.mamba, Mamba)
