"""Adaptive Neural Networks (Bolukbasi et al.): learned early exit, learned selection among
pretrained networks.
"""
