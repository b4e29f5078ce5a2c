"""Impatient DNNs (Amthor, Rodner, Denzler 2016): Table 1 on data we have. `python -m
papers.impatient_dnn --help`.
"""
