"""What a policy is fitted to: exactly one target."""

from impatient.errors import PolicyError


def one_target(**targets: float | None) -> tuple[str, float]:
    """Return the name and the number of the only target that is given.

    Raises:
        PolicyError: if none or several are given.
    Example:
        >>> one_target(mean_time_s=None, max_accuracy_loss=0.01)
        ('max_accuracy_loss', 0.01)
    """
    given = [(name, float(value)) for name, value in targets.items() if value is not None]
    if len(given) != 1:
        names = ", ".join(name for name, _ in given)
        raise PolicyError(
            f"give exactly one target of {', '.join(targets)}; given: {names or 'none'}."
        )
    return given[0]
