"""AutoAttack-lite beside the reference implementation: robust accuracy and seconds.

    pip install pyautoattack
    python tests/compare_autoattack.py runs/.../best.pt --n-examples 500

Both attack the same network and images in fp32, the reference by APGD-CE and APGD-T.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
import evaluate  # noqa: E402


def reference(model, x, y, eps, norm):
    """Which images withstand the reference, bool N."""
    from pyautoattack import AutoAttack
    attack = AutoAttack(model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0,
                        version="custom", attacks=["apgd-ce", "apgd-t"], device=y.device.type)
    attack.apgd.n_restarts = 1  # as in its standard version
    x_adv, _ = attack.run_standard_evaluation(x.float() / 255, y)
    with torch.no_grad():
        return model(x_adv).argmax(1) == y


def main():
    args = evaluate.parse_args()
    checkpoint = evaluate.Checkpoint(args.checkpoints[0], args)
    _, (lite, ) = evaluate.chosen_attacks(checkpoint, [])["lite"]
    with common.exact(checkpoint.model) as model:
        for name, withstand in (
                ("AutoAttack-lite", lambda: checkpoint.withstand([lite], "lite")),
                ("reference, APGD-CE and APGD-T", lambda: reference(
                    model, checkpoint.x, checkpoint.y, checkpoint.eps, checkpoint.norm))):
            start, left = time.perf_counter(), withstand()
            print(f"{name}: {evaluate.percent(left):.2f} % of {len(left)} images, "
                  f"{time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
