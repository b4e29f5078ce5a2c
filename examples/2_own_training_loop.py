"""Exits in a training loop of one's own: the library's pieces are plain functions.

python examples/2_own_training_loop.py
"""

import torch

import impatient
from impatient.training.losses import exit_hits, exit_losses, weighted_loss


def main(epochs: int = 5) -> list[float]:
    data = impatient.load_data("digits")
    backbone = impatient.load_model(
        "impatient:resnet:n=1,c=8", num_classes=data.num_classes, in_channels=1
    )
    network = impatient.attach_exits(
        backbone, after=["blocks.0", "blocks.1"], heads="relu_linear", example=data.example()
    )
    weights = torch.tensor(impatient.training.weights.half_end(network.num_exits))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(epochs):
        network.train()
        for inputs, labels in data.batches("train", 64):
            loss = weighted_loss(exit_losses(network(inputs), labels), weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    with torch.inference_mode():
        hits = sum(exit_hits(network(inputs), labels) for inputs, labels in data.batches("test"))
    accuracy = (hits / data.size("test")).tolist()
    print("test accuracy by exit:", [f"{value:.1%}" for value in accuracy])
    return accuracy


if __name__ == "__main__":
    main()
