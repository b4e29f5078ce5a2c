"""Run stages in other engines: compiled by torch, ONNX Runtime or OpenVINO."""

from impatient.engines.export import export, load_engine, to_engine
from impatient.engines.network import EngineNetwork
from impatient.networks.placement import ENGINES

__all__ = ["ENGINES", "EngineNetwork", "export", "load_engine", "to_engine"]
