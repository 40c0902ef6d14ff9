"""The networks: shapes, parameter names of the field, normalisation, precision."""

import pytest
import torch
import torch.nn.functional as F

import common
import models


@pytest.mark.parametrize("arch", models.ARCHS)
def test_every_architecture_classifies_and_backpropagates(arch):
    torch.manual_seed(0)
    model = models.build_model(arch, 7, width=8).eval()
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    logits = model(x)
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert x.grad.abs().max() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())  # none is left over


def test_sizes_are_those_of_the_literature():
    """Parameters in millions, for 10 classes, as published with the field's implementations."""
    sizes = {"resnet18": 11.17, "resnet50": 23.52, "preactresnet18": 11.17, "wrn-28-10": 36.48,
             "wrn-34-10": 46.16, "vgg16": 14.73}
    for arch, size in sizes.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in models.build_model(arch, 10).parameters())
        assert count / 1e6 == pytest.approx(size, abs=0.01), arch


def test_parameter_names_are_those_of_the_common_cifar_resnets():
    names = models.build_model("resnet18", 10, width=8).state_dict().keys()
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer1.1.bn2.bias",
            "layer2.0.shortcut.0.weight", "layer2.0.shortcut.1.weight", "linear.weight"} <= names
    assert not any("layer1.0.shortcut" in name for name in names)
    assert len(names) == 122  # and nothing else, such as buffers of the normalisation
    names = models.build_model("resnet50", 10, width=8).state_dict().keys()
    assert {"layer1.0.conv3.weight", "layer1.0.shortcut.0.weight"} <= names
    names = models.build_model("preactresnet18", 10, width=8).state_dict().keys()
    assert {"layer2.0.shortcut.0.weight", "bn.weight"} <= names
    assert not {"layer2.0.shortcut.1.weight", "bn1.weight"} & names


def test_residual_blocks_recomputed(model):
    """A block with its formula written out from the parameters."""
    block, x = model.layer2[0].eval(), torch.rand(2, 8, 8, 8)

    def bn(x, norm):
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    out = F.relu(bn(F.conv2d(x, block.conv1.weight, stride=2, padding=1), block.bn1))
    out = bn(F.conv2d(out, block.conv2.weight, padding=1), block.bn2)
    short = bn(F.conv2d(x, block.shortcut[0].weight, stride=2), block.shortcut[1])
    assert torch.allclose(block(x), F.relu(out + short), atol=1e-6)

    torch.manual_seed(0)
    block = models.PreActBlock(8, 16, 2, torch.nn.ReLU(), bottleneck=True).eval()
    pre = F.relu(bn(x, block.bn1))
    out = F.relu(bn(F.conv2d(pre, block.conv1.weight), block.bn2))
    out = F.relu(bn(F.conv2d(out, block.conv2.weight, stride=2, padding=1), block.bn3))
    out = F.conv2d(out, block.conv3.weight) + F.conv2d(pre, block.shortcut[0].weight, stride=2)
    assert torch.allclose(block(x), out, atol=1e-6)


def test_normalisation_is_inside(batch):
    x, _ = batch
    torch.manual_seed(0)
    plain = models.build_model("resnet10", 10, 8, mean=(0.0,) * 3, std=(1.0,) * 3).eval()
    inside = models.build_model("resnet10", 10, 8, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).eval()
    inside.load_state_dict(plain.state_dict())
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    outside = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert torch.allclose(inside(x), plain(outside), atol=1e-5)


@pytest.mark.parametrize("activation, function", [("softplus", F.softplus), ("swish", F.silu)])
@pytest.mark.parametrize("arch", ["resnet10", "preactresnet18", "vgg16"])
def test_activations(arch, activation, function, monkeypatch, batch):
    torch.manual_seed(0)
    model = models.build_model(arch, 10, 8, activation).eval()
    torch.manual_seed(0)
    relu = models.build_model(arch, 10, 8, "relu").eval()
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: function(x))
    assert torch.allclose(model(batch[0]), relu(batch[0]), atol=1e-6)


def test_precision_is_the_models_own_business_and_never_that_of_results(model, batch):
    """Logits are always fp32; `exact` computes in fp32, on a copy, and without TF32."""
    x, _ = batch
    reference = model.eval()(x)
    model.dtype = torch.bfloat16
    model.train()
    with common.exact(model) as network:
        assert torch.allclose(network(x), reference, atol=1e-4)
        assert not network.training and network.dtype == torch.float32
        assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.deterministic
        assert not torch.backends.cuda.matmul.allow_tf32
    assert model.training and model.dtype == torch.bfloat16
    reduced = model.eval()(x)
    assert reduced.dtype == torch.float32 and not torch.equal(reduced, reference)
    assert torch.allclose(reduced, reference, atol=0.1)


@pytest.mark.parametrize("arch", ["resnet18", "preactresnet18"])
def test_bf16_on_cpus_takes_the_stage_of_4x4_pixels_in_nchw_and_computes_the_same(arch):
    torch.manual_seed(0)
    model, x = models.build_model(arch, 10, 64).eval(), torch.rand(4, 3, 32, 32)
    formats, found = [], []
    model.layer4.register_forward_pre_hook(lambda layer, x: formats.append(x[0].is_contiguous()))
    for dtype in (torch.float32, torch.bfloat16):
        model.compute_in(dtype)
        assert model.layer4[0].conv2.weight.is_contiguous() == (dtype == torch.bfloat16)
        model.zero_grad()
        logits = model(x)
        logits[:, 0].sum().backward()
        found.append((logits, model.layer4[1].conv2.weight.grad.clone()))
    for one, other in zip(*found):
        assert (one - other).norm() < 0.05 * one.norm()
    with common.exact(model) as network:
        network(x)
    assert formats == [False, True, False]  # results are computed in fp32
    for other in (models.build_model(arch, 10, 8), models.build_model(arch, 10, 64, size=64)):
        other.compute_in(torch.bfloat16)
        assert not other.nchw and not other.layer4[0].conv2.weight.is_contiguous()


def test_exact_sets_the_compiled_network_aside(model, batch):
    def compiled(x):
        raise AssertionError("used the compiled network")
    model.network = compiled
    with common.exact(model) as network:
        network(batch[0])
    assert model.network is compiled


@pytest.mark.parametrize("arch", models.ARCHS)
def test_folding_batchnorm_changes_nothing_but_the_number_of_layers(arch):
    """Logits and their gradient in the input; all but what precedes a convolution is folded."""
    torch.manual_seed(0)
    model = models.build_model(arch, 10, 8).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    network, x = models.folded(model), torch.rand(2, 3, 32, 32).double().requires_grad_()
    model.eval()
    for a, b in ((model(x), network(x)), [torch.autograd.grad(net(x)[:, 0].sum(), x)[0]
                                          for net in (model, network)]):
        assert torch.allclose(a, b, atol=1e-9)
    left = [name for name, module in network.named_modules()
            if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(name.endswith("bn1") or name == "bn" for name in left)
    assert bool(left) == ("wrn" in arch or "preact" in arch)
