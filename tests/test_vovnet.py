"""VoVNetV2: counts to the unit, timm's numbers, other people's names for the same weights."""

import pytest
import timm
import torch

from leansense.layers.trunk import frozen_statistics
from leansense.layers.vovnet import (
    KINDS,
    VoVNet,
    from_detectron2,
    load_trunk,
    map_size,
    mix,
    to_detectron2,
)


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def small(**settings) -> VoVNet:
    """A network that runs in milliseconds, with norms that change what passes."""
    torch.manual_seed(0)
    net = VoVNet(**{"kind": 39, "width": 0.125} | settings)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net


@pytest.mark.parametrize("kind, every, number", [
    (99, True, 69_523_520), (99, False, 62_174_272), (39, True, 25_184_128),
    (39, False, 23_543_936), (57, True, 41_454_912), (57, False, 37_583_936),
    (19, True, 10_180_416), (19, False, 10_180_416),
])  # fmt: skip
def test_counts(kind, every, number):
    with torch.device("meta"):
        assert count(VoVNet(kind, every)) == number


@pytest.mark.parametrize("every, numbers", [
    (True, (112_832, 1_001_472, 7_288_000, 40_539_264, 20_581_952)),
    (False, (112_832, 1_001_472, 6_762_688, 35_814_528, 18_482_752)),
])  # fmt: skip
def test_counts_by_stage(every, numbers):
    with torch.device("meta"):
        net = VoVNet(99, every)
    assert tuple(map(count, (net.stem, *net.stages))) == numbers


@pytest.mark.parametrize("kind", [39, 99])
def test_equals_timm(kind):
    """Its weights load as they are, and both maps come out the same; ours load into timm's."""
    torch.manual_seed(kind)
    theirs = timm.create_model(f"ese_vovnet{kind}b", features_only=False, num_classes=0).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    ours = VoVNet(kind, ese_every_block=False).eval()
    state = theirs.state_dict()
    ours.load_state_dict(state)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        fine, coarse = ours(images)
        x = theirs.stem(images)
        maps = [x := stage(x) for stage in theirs.stages]
    for mine, other in zip((fine, coarse), maps[2:], strict=True):
        assert float((mine - other).abs().max() / other.abs().max()) < 1e-5
    theirs.load_state_dict(ours.state_dict())


def test_widths_and_strides():
    """The two maps have the channels that the network announces, at strides 16 and 32."""
    fine, coarse = small()(torch.randn(2, 3, 128, 352))
    assert fine.shape == (2, 96, 8, 22) and coarse.shape == (2, 128, 4, 11)
    with torch.device("meta"):
        assert VoVNet(99).channels == [768, 1024]


def test_map_size():
    """What it says is what comes, at sizes that are no multiple of anything, too."""
    net = small(kind=19, width=0.1).eval()
    with torch.no_grad():
        for height in (33, 47, 64, 65, 100, 112):
            for width in (32, 61, 308):
                fine, _ = net(torch.zeros(1, 3, height, width))
                assert tuple(fine.shape[2:]) == map_size(height, width)
    assert map_size(128, 352) == (8, 22) and map_size(112, 308) == (7, 19)


def test_checkpointing_changes_no_number():
    plain, frugal = small(), small(checkpointing=True)
    images, results = torch.randn(2, 3, 64, 96), []
    for net in (plain, frugal):
        sum(m.square().mean() for m in net(images)).backward()
        results.append(([p.grad for p in net.parameters()], list(net.buffers())))
    for one, other in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_checkpointing_keeps_less():
    from leansense.core.cost import saved_bytes

    images = torch.randn(1, 3, 64, 96)
    with frozen_statistics(net := small()):
        plain = saved_bytes(net, images)
    assert saved_bytes(small(checkpointing=True), images) < plain / 2


def test_gates():
    """One in every block, or in the last of each stage; and they weigh channels."""
    for every in (True, False):
        with torch.device("meta"):
            net = VoVNet(99, every)
        gates = [[b.attn is not None for b in stage.blocks] for stage in net.stages]
        numbers = KINDS[99][1]
        assert gates == [[every] * (n - 1) + [True] for n in numbers]
    net = small().eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = net(images)[1]
        net.stages[3].blocks[0].attn.fc.bias.add_(1)
        assert not torch.equal(net(images)[1], before)


def test_mix_is_a_convolution_of_all_maps(monkeypatch):
    """Values and gradients; kept for the backward pass are the maps alone."""
    torch.manual_seed(0)
    maps = [torch.randn(2, c, 4, 6, dtype=torch.float64) for c in (8, 5, 3)]
    maps = [m.to(memory_format=torch.channels_last).requires_grad_() for m in maps]
    weight = torch.randn(7, 16, 1, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *given: mix(given[0], given[1:]), (weight, *maps))
    both = mix(weight, maps), torch.nn.functional.conv2d(torch.cat(maps, 1), weight)
    assert torch.allclose(*both) and both[0].is_contiguous(memory_format=torch.channels_last)
    assert "Mix" in type(both[0].grad_fn).__name__
    monkeypatch.setenv("LEANSENSE_BACKENDS", "torch")
    assert "Convolution" in type(mix(weight, maps).grad_fn).__name__


def test_one_map():
    """Stage 5 is there, at rest: counted, not run, not trained."""
    net = small(maps=1)
    (fine,) = net(torch.randn(1, 3, 64, 96))
    fine.square().mean().backward()
    assert net.channels == [96] and count(net) == count(small())
    trained = {n for n, p in net.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in net.named_parameters() if not n.startswith("stages.3.")}
    assert not any(p.requires_grad for p in net.stages[3].parameters())


THEIRS = {  # as the authors' code names them
    "stem.0.conv.weight": "stem.stem_1/conv.weight",
    "stem.2.bn.running_mean": "stem.stem_3/norm.running_mean",
    "stages.0.blocks.0.conv_mid.0.conv.weight": "stage2.OSA2_1.layers.0.OSA2_1_0/conv.weight",
    "stages.2.blocks.1.conv_mid.4.bn.bias": "stage4.OSA4_2.layers.4.OSA4_2_4/norm.bias",
    "stages.3.blocks.0.conv_concat.conv.weight": "stage5.OSA5_1.concat.OSA5_1_concat/conv.weight",
    "stages.3.blocks.1.attn.fc.bias": "stage5.OSA5_2.ese.fc.bias",
}


def test_detectron2_names():
    """Known names both ways; whole networks there and back; a frozen detector's file."""
    net = small()
    state = net.state_dict()
    translated = to_detectron2(state)
    for ours, theirs in THEIRS.items():
        assert torch.equal(translated[theirs], state[ours])
    back = from_detectron2(translated)
    assert back.keys() == state.keys() and all(torch.equal(back[n], state[n]) for n in state)
    frozen = {
        f"backbone.bottom_up.{name}": value
        for name, value in translated.items()
        if not name.endswith("num_batches_tracked")
    } | {"proposal_generator.rpn_head.conv.weight": torch.zeros(1)}
    assert from_detectron2(frozen).keys() == state.keys()


def test_load_trunk(tmp_path):
    """Files of both origins load; what does not fit is refused with the file's name."""
    net, path = small(), tmp_path / "vovnet.pth"
    torch.save({"model": to_detectron2(net.state_dict())}, path)
    twin = load_trunk(VoVNet(39, width=0.125), path).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(twin(images)[1], net.eval()(images)[1])
    torch.save(small(ese_every_block=False).state_dict() | {"head.fc.bias": torch.zeros(1)}, path)
    load_trunk(small(ese_every_block=False), path)
    with pytest.raises(ValueError, match="vovnet.pth.*ese_every_block=False"):
        load_trunk(net, path)
    with pytest.raises(ValueError, match="vovnet.pth.*stem.0.conv.weight"):
        load_trunk(VoVNet(39, False, width=0.25), path)


@pytest.mark.parametrize("settings, said", [
    ({"kind": 38}, "kind=38"),
    ({"width": 0.0}, "width=0.0"),
    ({"maps": 3}, "maps=3"),
    ({"pretrained": True}, "VoVNet-99.*vovnet-detectron2"),
    ({"kind": 39, "pretrained": True}, "ese_every_block=False"),
    ({"kind": 39, "ese_every_block": False, "width": 0.5, "pretrained": True}, "width=1"),
])  # fmt: skip
def test_wrong_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        VoVNet(**settings)
