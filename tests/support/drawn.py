"""Pictures of drawn objects, with their boxes, and a small detector for them."""

import torch
from torch import Tensor, nn

SIDE = 16
# targets are filled up to so many objects
MOST = 2


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def objects(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw none to two objects: filled squares, class 0, and hollow ones, class 1.

    Returns:
        Pictures [N, 1, SIDE, SIDE] and targets [N, MOST, 5], filled up with class -1.
    """
    draw = random(seed)
    x = 0.2 * torch.randn(count, 1, SIDE, SIDE, generator=draw)
    target = torch.zeros(count, MOST, 5)
    target[:, :, 0] = -1
    for picture, rows in zip(x[:, 0], target, strict=True):
        # one in each half, so that they do not hide each other
        for half in range(int(torch.randint(MOST + 1, (1,), generator=draw))):
            kind, size, down, right = (
                int(torch.randint(low, high, (1,), generator=draw))
                for low, high in ((0, 2), (5, 8), (0, 8), (0, 2))
            )
            left = right + half * SIDE // 2
            size = min(size, SIDE // 2 * (half + 1) - left)
            picture[down : down + size, left : left + size] += 1
            if kind:
                picture[down + 1 : down + size - 1, left + 1 : left + size - 1] -= 1
            middle = [(left + size / 2) / SIDE, (down + size / 2) / SIDE]
            rows[half] = torch.tensor([kind, *middle, size / SIDE, size / SIDE])
    return x, target


class Detector(nn.Module):
    """A detector of the DETR family: queries that every decoder layer makes better."""

    def __init__(self, num_classes: int = 2, width: int = 32, queries: int = 4) -> None:
        super().__init__()
        self.maps = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 4, 2, 1), nn.ReLU()
        )
        cells = (SIDE // 4) ** 2
        self.places = nn.Parameter(0.5 * torch.randn(cells, width))
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(width, 4, 64, 0.0, batch_first=True) for _ in range(3)
        )
        self.classes = nn.Linear(width, num_classes + 1)
        self.boxes = nn.Linear(width, 4)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        memory = self.maps(pictures).flatten(2).transpose(1, 2) + self.places
        queries = self.queries.expand(pictures.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, memory)
        return {"logits": self.classes(queries), "boxes": self.boxes(queries).sigmoid()}
