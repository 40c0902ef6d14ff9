"""The networks against the official ones, written out here; normalisation, precision, `exact`."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import TINY
from torch import nn

import common
import fast_at


def randomise(model):
    """Gives BatchNorm values under which any mistake shows."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.1, 0.4)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


@pytest.mark.parametrize("arch", common.ARCHS)
def test_every_architecture_classifies_and_backpropagates(arch):
    model = randomise(common.Classifier(arch, 7, 16))
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    logits = model(x)
    assert logits.shape == (2, 7) and not torch.allclose(logits[0], logits[1], rtol=1e-3)
    logits.square().sum().backward()
    assert x.grad.abs().max() > 0
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("arch, parameters", [
    ("resnet18", 11_173_962), ("resnet34", 21_282_122), ("resnet50", 23_520_842),
    ("preactresnet18", 11_172_170), ("preactresnet18-v2", 11_172_170), ("vgg16", 14_728_266),
    ("wrn-16-8", 10_961_370), ("wrn-28-10", 36_479_194), ("wrn-34-10", 46_160_474)])
def test_the_numbers_of_parameters_are_those_of_the_literature(arch, parameters):
    with torch.device("meta"):
        model = common.Classifier(arch, 10)
    assert sum(p.numel() for p in model.parameters()) == parameters


# ------------------------------------------------------------------ the official networks, in brief
class OfficialBlock(nn.Module):
    """kuangliu's BasicBlock ("v1"), and the PreActBlock of Wong et al., GradAlign, Fast-BAT and
    Backward Smoothing ("raw") or of Rice et al., KD-SWA and WideResNet ("activated")."""

    def __init__(self, kind, inputs, planes, stride, act):
        super().__init__()
        self.kind, self.act, self.outputs = kind, act, planes
        self.bn1, self.bn2 = map(nn.BatchNorm2d, (planes if kind == "v1" else inputs, planes))
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        if kind == "bottleneck":  # that of Rice et al.'s PreActResNet-50
            self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
            self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
            self.bn3, self.outputs = nn.BatchNorm2d(planes), 4 * planes
            self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        if stride != 1 or inputs != self.outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, self.outputs, 1, stride, bias=False))
            self.shortcut.extend([nn.BatchNorm2d(planes)] if kind == "v1" else [])

    def forward(self, x):
        if self.kind == "v1":
            out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
            return self.act(out + (self.shortcut(x) if hasattr(self, "shortcut") else x))
        out = self.act(self.bn1(x))
        if hasattr(self, "shortcut"):
            x = self.shortcut(x if self.kind == "raw" else out)
        out = self.conv2(self.act(self.bn2(self.conv1(out))))
        return x + (self.conv3(self.act(self.bn3(out))) if self.kind == "bottleneck" else out)


class Official(nn.Module):
    def __init__(self, kind, blocks, width, act, final_bn=True):
        super().__init__()
        self.conv1, channels = nn.Conv2d(3, 16, 3, 1, 1, bias=False), 16
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        for i, (name, n) in enumerate(zip(self.stages, blocks)):
            setattr(self, name, nn.Sequential())
            for stride in [1 if i == 0 else 2] + [1] * (n - 1):
                getattr(self, name).append(OfficialBlock(kind, channels, width * 2**i, stride, act))
                channels = getattr(self, name)[-1].outputs
        self.act, self.bn1 = act, nn.BatchNorm2d(16) if kind == "v1" else None
        self.bn = nn.BatchNorm2d(channels) if final_bn and kind != "v1" else None
        self.linear = nn.Linear(channels, 10)

    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x))) if self.bn1 else self.conv1(x)
        for name in self.stages:
            out = getattr(self, name)(out)
        return self.linear((self.act(self.bn(out)) if self.bn else out).mean((2, 3)))


ACTIVATIONS = {"relu": F.relu, "softplus": lambda x: x.exp().log1p(),
               "softplus10": lambda x: x.clamp(min=0) + (-10 * x.abs()).exp().log1p() / 10,
               "swish": lambda x: x * x.sigmoid()}


@pytest.mark.parametrize("arch, kind, blocks, width, activation", [
    ("resnet18", "v1", (2, 2, 2, 2), 16, "softplus"),
    ("preactresnet18", "raw", (2, 2, 2, 2), 16, "relu"),
    ("preactresnet34", "raw", (3, 4, 6, 3), 16, "relu"),
    ("preactresnet18-v2", "activated", (2, 2, 2, 2), 16, "relu"),
    ("preactresnet50", "bottleneck", (3, 4, 6, 3), 16, "relu"),
    ("wrn-16-8", "activated", (2, 2, 2), 32, "relu"),
    ("preactresnet18", "raw", (2, 2, 2, 2), 16, "swish"),
    ("preactresnet18", "raw", (2, 2, 2, 2), 16, "softplus10")])
def test_official_weights_give_the_same_logits(arch, kind, blocks, width, activation):
    official = randomise(Official(kind, blocks, width, ACTIVATIONS[activation]))
    model = common.Classifier(arch, 10, width, activation).eval()
    model.load_state_dict(official.state_dict())  # strict: the same names and shapes, no others
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(model(x), official(x), atol=1e-5)


def test_a_resnet_for_large_images_is_torchvisions():
    """From 128 pixels on the stem is ImageNet's; below it is CIFAR's."""
    assert common.Classifier("resnet50", 10, 16, size=127).conv1.stride == (1, 1)
    official = randomise(torchvision.models.resnet50(num_classes=10))
    weights = {name.replace("fc.", "linear.").replace("downsample", "shortcut"): value
               for name, value in official.state_dict().items()}
    model = common.Classifier("resnet50", 10, size=128).eval()
    model.load_state_dict(weights)
    x = torch.rand(1, 3, 128, 128)
    assert torch.allclose(model(x), official(x), rtol=1e-4, atol=1e-5)


def test_vgg16_is_torchvisions_with_a_single_linear_layer():
    official = randomise(torchvision.models.vgg16_bn(num_classes=1, init_weights=False).features)
    model = common.Classifier("vgg16", 10).eval()
    model.features.load_state_dict(official.state_dict())
    x = torch.rand(1, 3, 32, 32)
    assert torch.allclose(model(x), model.classifier(official(x).mean((2, 3))), atol=1e-5)


# ------------------------------------------------------------------------ normalisation, precision
def test_normalisation_is_inside_and_that_of_the_training_images():
    torch.manual_seed(0)
    x = (torch.rand(40, 3, 32, 32) * torch.tensor([100, 200, 255]).view(3, 1, 1)).byte()
    x[30:] = 255  # held out
    data = common.Data((x, torch.zeros(40), torch.arange(30)), None, None, ["a", "b"])
    model = common.prepare_model(fast_at.parse_args(TINY), data).eval()
    train = x[:30].double() / 255
    mean, std = (part.view(3, 1, 1) for part in (train.mean((0, 2, 3)), train.std((0, 2, 3))))
    assert torch.allclose(model.mean.double(), mean, atol=1e-6)
    assert torch.allclose(model.std.double(), std, atol=1e-5)
    plain = common.Classifier("resnet10", 2, 16).eval()
    plain.load_state_dict(model.state_dict())  # which does not hold mean and std
    images = x[:4] / 255
    assert torch.allclose(model(images), plain(((images - mean) / std).float()), atol=1e-5)


@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
def test_the_memory_format_is_the_same_in_the_whole_network(monkeypatch, format):
    monkeypatch.setattr(common, "FORMAT", format)
    model, x = common.Classifier("resnet10", 10, 16), torch.rand(2, 3, 32, 32)
    seen = [common.augment((x * 255).byte(), flip=True), *model.parameters()]
    for layer in [*model.modules()][1:]:
        layer.register_forward_hook(lambda layer, inputs, output: seen.extend([*inputs, output]))
    for other in (torch.channels_last, torch.contiguous_format):
        model(x.contiguous(memory_format=other))
    assert all(y.is_contiguous(memory_format=format) for y in seen if y.dim() == 4)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential, nn.DataParallel])
def test_precision_is_the_models_own_business_and_never_that_of_results(model, batch, wrap):
    """Logits are always fp32, and `exact` computes in fp32, on a copy in eval mode."""
    x, _ = batch
    reference = model.eval()(x)
    model.dtype = torch.bfloat16
    reduced = model(x)
    assert reduced.dtype == torch.float32 and not torch.equal(reduced, reference)
    assert torch.allclose(reduced, reference, atol=0.1)
    whole = wrap(model).train()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    with common.exact(whole) as copy:
        assert torch.allclose(copy(x), reference, atol=1e-5)
        assert not any(module.training for module in copy.modules())
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.allow_tf32
        for parameter in copy.parameters():
            parameter.zero_()
    assert all(module.training for module in whole.modules()) and model.dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())


def test_exact_does_not_use_the_compiled_network(model, batch):
    def backend(graph, inputs):
        raise AssertionError("compiled")
    reference = model.eval()(batch[0])
    model.compiled = True
    model.compile(backend=backend)
    with common.exact(model) as copy:
        assert torch.equal(copy(batch[0]), reference) and model.compiled and not copy.compiled


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm,
                                  nn.utils.parametrizations.weight_norm])
def test_exact_takes_networks_whose_weights_are_computed(norm):
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Conv2d(3, 8, 3)), nn.Flatten(), nn.Linear(8 * 36, 5))
    x = torch.rand(4, 3, 8, 8)
    model(x)  # with gradients, as in training
    reference = model.eval()(x)
    with common.exact(model) as copy:
        assert torch.allclose(copy(x), reference, atol=1e-5)
