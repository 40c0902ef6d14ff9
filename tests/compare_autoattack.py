"""AutoAttack-lite beside the reference implementation: robust accuracy and seconds.

    pip install pyautoattack          # used here alone, never needed by the project
    python tests/compare_autoattack.py runs/.../best.pt --n-examples 500
    python tests/compare_autoattack.py runs/.../best.pt --n-examples 500 --complete

Both attack the same network in fp32, the same test images (of which --seed draws the first
--n-examples) and take the same number of iterations, in alternating rounds, each in a process of
its own: AutoAttack-lite as evaluate.py runs it, the reference as its README does, with a batch size
of 250. The reference runs APGD-CE and APGD-T, on the network in PyTorch's default memory format,
NCHW, and once more on the network as this project has it, in channels_last; --complete adds, in the
first round, the whole of AutoAttack, with FAB-T and Square. Not for pytest.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
import evaluate  # noqa: E402


def lite(model, x, y, eps, norm, device):
    attack = functools.partial(evaluate.autoattack_lite, eps=eps, norm=norm,
                               generator=torch.Generator(device).manual_seed(0))
    return common.still_correct(model, x, y, lambda model, x, y: x, attack)


def reference(model, x, y, eps, norm, device, attacks=("apgd-ce", "apgd-t")):
    from pyautoattack import AutoAttack
    attack = AutoAttack(model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0,
                        version="custom", attacks=list(attacks), device=device)
    attack.apgd.n_restarts = attack.fab.n_restarts = 1  # as in its standard version
    x_adv, _ = attack.run_standard_evaluation(x.float() / 255, y)
    with torch.no_grad():
        return model(x_adv).argmax(1) == y


def in_nchw(model, *task):
    """The reference on the same weights in NCHW, as most repositories have their networks."""
    class Plain(nn.Module):
        def forward(self, x):
            return nn.Sequential.forward(model, (x - model.mean) / model.std)
    model.to(memory_format=torch.contiguous_format)
    return reference(Plain(), *task)


def complete(*task):
    return reference(*task, attacks=("apgd-ce", "apgd-t", "fab-t", "square"))


CONTESTANTS = {"AutoAttack-lite": lite, "reference: APGD-CE, APGD-T": in_nchw,
               "the same in channels_last": reference,
               "reference: complete AutoAttack": complete}


def run(options):
    """One contestant: prints its robust accuracy in percent, and its seconds."""
    device = common.set_up(options.device)
    model, checkpoint = common.load_model(options.checkpoint, device)
    trained = checkpoint["args"] | dict(device=device)
    data = common.load_data(argparse.Namespace(**trained))
    order = torch.randperm(len(data.test[1]), generator=torch.Generator().manual_seed(options.seed))
    x, y = (part[order[:options.n_examples].to(part.device)].to(device) for part in data.test)
    eps = trained["eps"] if options.eps is None else options.eps
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        start = time.perf_counter()
        correct = CONTESTANTS[options.contestant](
            model, x, y, eps, options.norm or trained["norm"], device)
        torch.get_device_module(device).synchronize()
    print(json.dumps([100 * correct.float().mean().item(), time.perf_counter() - start]))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint")
    add("--n-examples", type=int, default=500)
    add("--eps", type=common.over_255, help="in units of 1/255; None: as in training")
    add("--norm", choices=["linf", "l2"], help="None: as in training")
    add("--rounds", type=int, default=1)
    add("--complete", action="store_true", help="also the whole of AutoAttack")
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    add("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        return run(options)
    if importlib.util.find_spec("pyautoattack") is None:
        common.fail("pip install pyautoattack")
    print(f"{options.checkpoint}, {options.n_examples} test images, {torch.get_num_threads()} "
          f"threads, torch {torch.__version__}", flush=True)
    seconds = {name: [] for name in CONTESTANTS}
    for i in range(options.rounds):
        for name in list(CONTESTANTS)[:4 if options.complete and not i else 3]:
            done = subprocess.run([sys.executable, *sys.argv, "--contestant", name], text=True,
                                  check=True, stdout=subprocess.PIPE)
            share, taken = json.loads(done.stdout.splitlines()[-1])
            seconds[name].append(taken)
            print(f"{name:31} {share:6.2f} %  {taken:8.1f} s", flush=True)
    ours, theirs, faster = (statistics.median(seconds[name]) for name in list(CONTESTANTS)[:3])
    print(f"AutoAttack-lite takes {ours / theirs:.2f} of the reference's time, "
          f"{ours / faster:.2f} of that on the network in channels_last")


if __name__ == "__main__":
    main()
