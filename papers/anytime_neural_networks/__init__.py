"""Anytime Neural Networks (Hu, Dey, Hebert, Bagnell): the milestone table, AANN against static
weights, the EANN figure.
"""
