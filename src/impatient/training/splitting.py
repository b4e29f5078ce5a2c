"""Choose which examples are held out, by a seed."""

from __future__ import annotations

import numpy as np

from impatient.errors import DataError


def held_out_mask(groups: np.ndarray, labels: np.ndarray, seed: int, share: float) -> np.ndarray:
    """Choose the examples to hold out, as a mask.

    A share of each class is held out, or of each class's groups where groups are given. Every class
    keeps at least one training example. A group is held out completely, even where it has examples
    of several classes.
    """
    random = np.random.default_rng(seed)
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        if groups is labels:
            mask[random.permutation(places)[: _held_out_count(len(places), share)]] = True
        else:
            kinds = random.permutation(np.unique(groups[places]))
            already = len(np.unique(groups[places[mask[places]]]))
            wanted = _held_out_count(len(kinds), share) - already
            mask = _with_groups(mask, kinds, wanted, groups, labels)
    if not mask.any() or mask.all():
        raise DataError(
            f"{len(labels)} training examples are too few to hold out {share:.0%} for validation; "
            "add data."
        )
    return mask


def _held_out_count(count: int, share: float) -> int:
    return min(max(1, round(share * count)), count - 1)


def _with_groups(
    mask: np.ndarray, kinds: np.ndarray, wanted: int, groups: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Add groups to a mask until as many are held out as wanted.

    A group is skipped if a class would be left without training examples.
    """
    classes = len(np.unique(labels))
    for kind in kinds:
        if wanted <= 0:
            break
        more = mask | (groups == kind)
        if not np.array_equal(more, mask) and len(np.unique(labels[~more])) == classes:
            mask = more
            wanted = wanted - 1
    return mask


def carved_out(labels: np.ndarray) -> np.ndarray:
    """Choose a fifth of the examples for the test split, as a mask.

    The choice does not depend on the user's seed.
    """
    return held_out_mask(labels, labels, seed=0, share=0.2)
