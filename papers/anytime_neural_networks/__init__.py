"""Anytime Neural Networks (Hu, Dey, Hebert, Bagnell).

There are the milestone table, AANN against static weights, and the EANN figure.
"""
