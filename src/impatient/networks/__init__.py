"""What is run: models cut into stages, heads, and the networks of the papers."""

from impatient.networks.heads import FeatureShape
from impatient.networks.multi_exit import MultiExitNetwork, attach_exits
from impatient.networks.resnet import PreActResNet
from impatient.networks.specs import load_model
from impatient.networks.stages import Exit, Walk

__all__ = ["Exit", "FeatureShape", "MultiExitNetwork", "PreActResNet", "Walk", "attach_exits", "load_model"]
