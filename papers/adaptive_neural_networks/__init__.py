"""Adaptive Neural Networks (Bolukbasi et al.).

The paper learns early exits, and it learns selection among pretrained networks.
"""
