"""Run stages in other engines: compiled by torch, ONNX Runtime or OpenVINO."""

from impatient.engines.export import ENGINES, export, load_engine, to_engine
from impatient.engines.network import EngineNetwork

__all__ = ["ENGINES", "EngineNetwork", "export", "load_engine", "to_engine"]
