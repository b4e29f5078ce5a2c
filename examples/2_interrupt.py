"""An answer whenever you ask: a run on its own thread, interrupted after a random time, with a
model from torchvision.

pip install 'impatient[vision]'
python examples/2_interrupt.py
"""

import random
import threading

import torch

import impatient


def main(runs: int = 10) -> list[int]:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 96, 96)
    network = impatient.attach_exits(
        impatient.load_model("torchvision:resnet18"), count=6, example=x
    ).eval()
    costs = impatient.profile(network, x, repeats=50)
    whole = costs.interruptible_s()[-1]
    random.seed(0)
    reached = []
    with impatient.Runner(network, costs) as runner:
        runner.warm_up(x)
        for _ in range(runs):
            patience = random.uniform(0.0, 1.2 * whole)
            with runner.start(x) as run:
                # somebody else's work
                threading.Event().wait(patience)
                answer = run.interrupt()
            print(
                f"asked after {patience * 1e3:6.2f} ms: exit {answer.exit} of "
                f"{network.num_exits - 1}, {answer.stopped_by}"
            )
            reached.append(answer.exit)
    return reached


if __name__ == "__main__":
    main()
