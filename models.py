"""The networks: CIFAR ResNets, PreActResNets, WideResNets and VGG-16, with normalisation inside."""

import copy
import functools
import itertools
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

ACTIVATIONS = {"relu": functools.partial(nn.ReLU, inplace=True),  # less memory to read and write
               "softplus": nn.Softplus, "swish": nn.SiLU}
ARCHS = {
    "resnet10": dict(blocks=(1, 1, 1, 1)),
    "resnet18": dict(blocks=(2, 2, 2, 2)),
    "resnet34": dict(blocks=(3, 4, 6, 3)),
    "resnet50": dict(blocks=(3, 4, 6, 3), bottleneck=True),
    "preactresnet18": dict(blocks=(2, 2, 2, 2), preact=True),
    "preactresnet34": dict(blocks=(3, 4, 6, 3), preact=True),
    "preactresnet50": dict(blocks=(3, 4, 6, 3), preact=True, bottleneck=True),
    "wrn-16-8": dict(blocks=(2, 2, 2), preact=True, stem=16, width=128),
    "wrn-28-10": dict(blocks=(4, 4, 4), preact=True, stem=16, width=160),
    "wrn-34-4": dict(blocks=(5, 5, 5), preact=True, stem=16, width=64),
    "wrn-34-10": dict(blocks=(5, 5, 5), preact=True, stem=16, width=160),
    "vgg16": {},
}


class Classifier(nn.Module):
    """Pictures N x 3 x H x W in [0, 1] -> logits N x C in fp32.

    Normalisation and training's precision are in here: no script and no attack sees them.
    """

    def __init__(self, mean, std):
        super().__init__()
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)
        self.dtype, self.network, self.compiled = torch.float32, self.logits, False

    def compute_in(self, dtype):
        """Takes training's precision, and the memory format that is fastest in it."""
        self.dtype = dtype
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype.itemsize == 2):
            return self.network(x).to(x.dtype)


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or as a bottleneck 1x1, 3x3 and 1x1."""
    preact = False

    def __init__(self, before, width, stride, activation, bottleneck):
        super().__init__()
        after = 4 * width if bottleneck else width
        kernels, strides = ((1, 3, 1), (1, stride, 1)) if bottleneck else ((3, 3), (stride, 1))
        sizes = [before] + [width] * (len(kernels) - 1) + [after]
        for i, (kernel, step) in enumerate(zip(kernels, strides)):
            conv = nn.Conv2d(sizes[i], sizes[i + 1], kernel, step, kernel // 2, bias=False)
            bn = nn.BatchNorm2d(sizes[i if self.preact else i + 1])
            layer = {f"conv{i + 1}": conv, f"bn{i + 1}": bn}
            for name in sorted(layer) if self.preact else layer:  # in the order of their use
                self.add_module(name, layer[name])
        # On CPUs the weight gradient of a strided 1x1 convolution of fewer than 16 channels writes
        # beyond its memory if the batch is odd (torch 2.6 to 2.15). So these pick the pixels first.
        self.every, self.shortcut = stride if before < 16 else 1, nn.Sequential()
        if stride > 1 or before != after:
            self.shortcut.append(nn.Conv2d(before, after, 1, stride // self.every, bias=False))
            if not self.preact:
                self.shortcut.append(nn.BatchNorm2d(after))
        self.activation, self.depth = activation, len(kernels)

    def layers(self):
        for i in range(1, self.depth + 1):
            yield getattr(self, f"conv{i}"), getattr(self, f"bn{i}")

    def forward(self, x):
        out = x
        for i, (conv, bn) in enumerate(self.layers()):
            out = bn(conv(self.activation(out) if i else out))
        return self.activation(out + self.shortcut(x[:, :, ::self.every, ::self.every]))


class PreActBlock(Block):
    """The same with BatchNorm and activation before each convolution (He et al. 2016b)."""
    preact = True

    def forward(self, x):
        out = self.activation(self.bn1(x))
        shortcut = x
        if len(self.shortcut):
            shortcut = self.shortcut(out[:, :, ::self.every, ::self.every])
        for i, (conv, bn) in enumerate(self.layers()):
            out = conv(self.activation(bn(out)) if i else out)
        return out + shortcut


class ResNet(Classifier):
    """CIFAR ResNet (He et al. 2016a), PreActResNet or, in three stages, WideResNet. For pictures
    of 128 pixels and more it begins as those for ImageNet do: 7x7 convolution and max-pooling.

    Parameters have the names of the field's CIFAR ResNets, so that their checkpoints load.
    """

    def __init__(self, classes, width, activation, mean, std, size, blocks, stem=None,
                 preact=False, bottleneck=False):
        super().__init__(mean, std)
        self.preact, self.stages, self.activation = preact, len(blocks), ACTIVATIONS[activation]()
        self.tiny_maps = size == 32 and len(blocks) == 4 and width >= 64 and not bottleneck
        channels, self.large, self.nchw = stem or width, size >= 128, False
        kernel, stride = (7, 2) if self.large else (3, 1)
        self.conv1 = nn.Conv2d(3, channels, kernel, stride, kernel // 2, bias=False)
        if not preact:
            self.bn1 = nn.BatchNorm2d(channels)
        for stage, count in enumerate(blocks):
            layer = nn.Sequential()
            for i in range(count):
                block, stride = PreActBlock if preact else Block, 2 if stage and not i else 1
                layer.append(block(channels, width << stage, stride, self.activation, bottleneck))
                channels = (width << stage) * (4 if bottleneck else 1)
            self.add_module(f"layer{stage + 1}", layer)
        if preact:
            self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, classes)

    def compute_in(self, dtype):
        super().compute_in(dtype)
        # On CPUs bf16 convolutions of 512 channels and 4x4 pixels take 0.6 of the time in NCHW.
        self.nchw = self.tiny_maps and (dtype, self.mean.device.type) == (torch.bfloat16, "cpu")
        if self.nchw:
            self.layer4.to(memory_format=torch.contiguous_format)

    def logits(self, x):
        x = self.conv1(x) if self.preact else self.activation(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1) if self.large else x
        for stage in range(self.stages):
            x = x.contiguous() if self.nchw and stage == 3 else x
            x = getattr(self, f"layer{stage + 1}")(x)
        x = self.activation(self.bn(x)) if self.preact else x
        return self.linear(x.mean((2, 3)))


class VGG(Classifier):
    """VGG-16 with BatchNorm (Simonyan & Zisserman 2015), with one linear layer on top."""

    def __init__(self, classes, width, activation, mean, std, size):
        super().__init__(mean, std)
        layers, channels = [], 3
        for factor in (1, 1, 0, 2, 2, 0, 4, 4, 4, 0, 8, 8, 8, 0, 8, 8, 8, 0):  # 0: pooling
            if factor:
                layers.append(nn.Conv2d(channels, channels := factor * width, 3, padding=1))
                layers += [nn.BatchNorm2d(channels), ACTIVATIONS[activation]()]
            else:
                layers.append(nn.MaxPool2d(2))
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(channels, classes)

    def logits(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def build_model(arch, classes, width=None, activation="relu", mean=(0.5,) * 3, std=(0.25,) * 3,
                size=32):
    """An untrained Classifier; `arch` from ARCHS, mean and std of the pictures' three channels,
    size in pixels."""
    options = {"width": 64} | ARCHS[arch] | ({"width": width} if width else {})
    family = ResNet if "blocks" in options else VGG
    return family(classes, activation=activation, mean=mean, std=std, size=size, **options)


def uncompiled(model):
    """A copy in fp32 that is not compiled."""
    network, model.network = model.network, None
    twin = copy.deepcopy(model)
    model.network = network
    twin.dtype, twin.network, twin.compiled = torch.float32, twin.logits, False
    twin.nchw = False
    return twin


def folded(model):
    """An uncompiled copy for evaluation, of the same function: in eval mode, with each BatchNorm
    that follows a convolution, an affine map there, made part of it."""
    twin = uncompiled(model).eval().requires_grad_(False)
    for parent in list(twin.modules()):
        for (name, conv), (after, bn) in itertools.pairwise(parent.named_children()):
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, bn))
                setattr(parent, after, nn.Identity())
    return twin.to(memory_format=torch.channels_last)


def canonical(weights, arch):
    """A state dict from elsewhere under our parameters' names, and the mean and std of the
    normalisation that it holds, lists of 3, or None.

    Knows the wrappers' prefixes (DataParallel, torch.compile, Sequential(Normalize, network),
    robustness), WideResNets as in TRADES and RobustBench, and torchvision's fc and downsample.
    """
    renamed, statistics = {}, {}
    for name, tensor in weights.items():
        name = re.sub(r"^((module|_orig_mod|model|1)\.)+", "", name)
        name = re.sub(r"^block(\d)\.layer\.", r"layer\1.", name)
        name = re.sub(r"^fc\.", "linear.", name).replace("convShortcut", "shortcut.0")
        name = name.replace("downsample", "shortcut")
        if ARCHS[arch].get("preact"):
            name = re.sub(r"^bn1\.", "bn.", name)
        last = name.split(".")[-1].removeprefix("new_")
        if last in ("mean", "mu", "std", "sigma") and tensor.numel() == 3:
            statistics["mean" if last in ("mean", "mu") else "std"] = tensor.flatten().tolist()
        elif not name.startswith(("sub_block1.", "attacker.")):  # copies of what is there already
            renamed[name] = tensor
    return renamed, statistics.get("mean"), statistics.get("std")
