"""docs/papers.md: its commands parse, and they run what the papers ran."""

import importlib
import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parent.parent / "docs" / "papers.md").read_text("utf-8")
SCRIPTS = "fast_at|trades|backward_smoothing|fast_bat|kd_swa|evaluate"
COMMANDS = re.findall(rf"`((?:{SCRIPTS})\.py\b[^`]*)`", TEXT)

# What the run in the folder runs/NAME has to resolve to; eps and alpha in units of 1/255.
RUNS = {
    "bs1-fast-at-seed0": dict(eps=7.905, alpha=10, steps=1, attack_bn="eval", precision="fp32"),
    "bs2-at": dict(eps=7.905, alpha=2, steps=10, attack_bn="eval", epochs=100, lr=0.1),
    "bs2-backward": dict(eps=7.905, alpha=7.905, beta=10, gamma=1, attack_bn="eval"),
    "bs3-trades": dict(eps=7.905, alpha=2, steps=10, beta=6, attack_bn="eval", dataset="cifar100"),
    "bs4-fast-trades": dict(alpha=6, steps=1, init="uniform", arch="resnet50"),
    "bs5-fast-at": dict(arch="wrn-34-10"), "bs6-gamma-0.1": dict(gamma=0.1, beta=10),
    "bs7-alpha-12": dict(alpha=12, eps=7.905), "bs9-beta-2.0": dict(beta=2, gamma=1),
    "bs8-backward": dict(lr=0.2, lr_schedule="cyclic", epochs=30), "bs10-alone": dict(alone=True),
    "bs12-points-5": dict(random_points=5), "bs-fig5-ce-seed0": dict(objective="ce"),
    "bs11-alone": dict(alone=True, dataset="cifar100"), "bs13-fast-at": dict(eps=16, alpha=20),
    "fb-pgd-2-16-seed0": dict(steps=2, alpha=8), "fb-fast-bat-16-seed0": dict(lmbda=0.1275),
    "fb-fast-at-8-seed0": dict(alpha=10, arch="preactresnet18", epochs=20, lr=0.2, val_size=5000),
    "fb-fast-at-ga-16-seed0": dict(init="zero", grad_align=2, attack_bn="train"),
    "fb-fast-bat-8-seed0": dict(arch="preactresnet18", lmbda=0.051, alpha2=0.0051, epochs=20),
    "fb-fast-bat-10-seed0": dict(lmbda=0.1275), "fb5-preactresnet50": dict(steps=0),
    "fb3-fast-bat": dict(eps=2, lmbda=0.085, alpha2=0.0085), "fba2-0.008": dict(lmbda=0.085),
    "fb4-fast-at-ga-8-wrn-16-8-seed0": dict(init="zero", grad_align=0.2, arch="wrn-16-8"),
    "fba1-2500": dict(lmbda=0.102, alpha2=0.0102), "fba2-0.025": dict(lmbda=0.255, alpha2=0.0255),
    "fba2-0.0167": dict(lmbda=0.17, alpha2=0.017), "fba3-corner": dict(lmbda=0.17),
    "fba2-0.0125": dict(lmbda=0.1275, alpha2=0.01275), "kd2-fgsm-linf-at": dict(alpha=7, steps=1),
    "fba4-aware-8": dict(hessian_aware=True, lmbda=0.051), "kd5-kd-std": dict(kd="std"),
    "fba5-softplus10-at-8": dict(activation="softplus10"), "kd6-tf-kd": dict(tf_kd=True),
    "kd-cifar10-at": dict(arch="preactresnet18-v2", steps=10, alpha=2, kd="none", no_swa=True),
    "kd-cifar10-kdswa": dict(lambda1=0.5, lambda2=0.25, val_size=5000, attack_bn="train"),
    "kd-cifar10-std": dict(steps=0, arch="preactresnet18-v2", epochs=200, milestones=[0.25, 0.75]),
    "kd2-pgd-l2-at": dict(norm="l2", eps=128, alpha=15), "kd3-vgg16-100-kdswa": dict(arch="vgg16"),
    "kd2-trades-linf-at": dict(attack_bn="eval"), "kd4-l2-at": dict(norm="l2", dataset="cifar100"),
    "kda7-l2-at": dict(milestones=[0.5, 0.75], keep_epochs=True), "kda10-iswa": dict(iswa=True),
    "kda8-at": dict(lr_schedule="cosine", lr=0.01, epochs=80, dataset="svhn", val_size=7326),
    "kda9-unseen": dict(steps=0, seed=1),
}

# What the first evaluation under a heading has to resolve to.
TESTS = {
    "Backward Smoothing, Table 2": dict(steps=100, restarts=1, alpha=2, start="zero"),
    "Backward Smoothing, Table 5": dict(attack=["lite", "square", "rays"]),
    "Fast-BAT, Table 1": dict(attack=["pgd", "lite"], steps=50, restarts=10, start="uniform",
                             apgd_steps=100),
    "KD-SWA, Table 2": dict(attack=["pgd"], steps=20, restarts=1, alpha=15, start="uniform"),
    "KD-SWA, Table 4": dict(attack=["lite", "square", "cw"]),
}


@pytest.fixture(autouse=True)
def imagenet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "cat", "dog":
        (tmp_path / "data/imagenet/train" / name).mkdir(parents=True)
        (tmp_path / "data/imagenet/train" / name / "1.png").touch()


def parse(command):
    script, *words = command.split()
    print(command)  # pytest shows it if the parser refuses it
    return vars(importlib.import_module(script.removesuffix(".py")).parse_args(words))


@pytest.mark.parametrize("name", [*RUNS, *TESTS])
def test_settings(name):
    if name in RUNS:
        command, = [line for line in COMMANDS if line.endswith(f"--out runs/{name}")]
    else:
        section = TEXT[TEXT.index(f"### {name}:"):]
        command = section[section.index("evaluate.py"):].split("`")[0]
    args, expected = parse(command), (RUNS | TESTS)[name]
    for key, value in expected.items():
        found = args[key] * 255 if key in ("eps", "alpha") else args[key]
        assert found == (value if isinstance(value, (str, list)) else pytest.approx(value)), key


def test_every_command_parses():
    assert len(COMMANDS) > 200 and all(map(parse, COMMANDS))
