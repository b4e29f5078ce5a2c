"""Other ways of running the stages: compiled by torch, or in ONNX Runtime or OpenVINO."""

from impatient.engines.export import ENGINES, export, load_engine, to_engine
from impatient.engines.network import EngineNetwork

__all__ = ["ENGINES", "EngineNetwork", "export", "load_engine", "to_engine"]
