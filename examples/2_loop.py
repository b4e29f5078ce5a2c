"""A loop whose every turn is an exit: pictures are cleaned until they hardly change.

python examples/2_loop.py

One layer is called six times, and each call makes the picture a little cleaner. Diffusion models,
optical flow (RAFT) and solvers are loops of this kind. A picture that is clean early leaves early.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import impatient

TURNS = 6


class Cleaner(nn.Module):
    """A network that refines its answer by calling one step again and again."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.begin = nn.Conv2d(1, width, 3, padding=1)
        self.step = Step(width)

    def forward(self, noisy: Tensor) -> Tensor:
        picture, state = noisy, self.begin(noisy)
        for _ in range(TURNS):
            picture, state = self.step(picture, state)
        return picture


class Step(nn.Module):
    """One turn of the loop, which returns its answer first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.look = nn.Conv2d(width + 1, width, 3, padding=1)
        self.change = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, picture: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = state + self.look(torch.cat([picture, state], 1)).relu()
        return picture + self.change(state), state


class Noisy:
    """Digits with noise of different strength, and what they were."""

    fingerprint = "digits with noise, seed 0"

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        clean = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
        strength = torch.rand(len(clean), 1, 1, 1, generator=draw)
        noisy = clean + strength * torch.randn(clean.shape, generator=draw)
        rows = torch.randperm(len(clean), generator=draw).split(600)
        names = ("train", "validation", "test")
        self.splits = {
            name: (noisy[part], clean[part]) for name, part in zip(names, rows, strict=False)
        }

    def size(self, split: str) -> int:
        return len(self.splits[split][0])

    def batches(self, split: str, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        parts = (part.split(batch_size) for part in self.splits[split])
        return list(zip(*parts, strict=True))


def main(epochs: int = 20) -> dict[str, float]:
    torch.manual_seed(0)
    data = Noisy()
    network = impatient.attach_exits(
        Cleaner(),
        example=data.splits["train"][0][:2],
        # every call of the step is an exit, and what it returns first is the answer
        after="calls:step",
        heads="identity",
        task="regression:scale=0.3",
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=0.003)
    for _ in range(epochs):
        for noisy, clean in data.batches("train", 50):
            losses = impatient.training.losses.task_losses(network.task, network(noisy), clean)
            optimizer.zero_grad()
            losses.mean(1).sum().backward()
            optimizer.step()
    network.eval()

    x, clean = data.splits["test"]
    costs = impatient.profile(network, x[:1], repeats=50)
    validation = impatient.record(network, data, split="validation")
    # a picture leaves when it has hardly changed since the turn before
    policy = impatient.fit_thresholds(
        validation, costs, mean_time_s=0.6 * costs.contract_s()[-1], score="agreement"
    )
    found = impatient.evaluate(impatient.record(network, data, split="test"), costs, policy)
    for turn in range(TURNS):
        print(f"after turn {turn + 1}: RMSE {found[f'exit {turn}'].metrics['RMSE']:.3f}")
    chosen = found["policy"]
    turns = sum((turn + 1) * share for turn, share in enumerate(chosen.shares))
    print(f"until it hardly changes: RMSE {chosen.metrics['RMSE']:.3f} in {turns:.1f} turns")

    with impatient.Runner(network, costs, policy) as runner:
        answer = runner.run(x[:1], deadline=impatient.Deadline.after(0.05))
    print(f"by a deadline: turn {answer.exit + 1}, off by {(answer.output - clean[:1]).std():.3f}")
    return {
        "first": found["exit 0"].metrics["RMSE"],
        "last": found[f"exit {TURNS - 1}"].metrics["RMSE"],
        "policy": chosen.metrics["RMSE"],
        "turns": turns,
    }


if __name__ == "__main__":
    main()
