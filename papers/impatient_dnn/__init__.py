"""Impatient DNNs (Amthor, Rodner, Denzler 2016), Table 1 on data that we have.

Run `python -m papers.impatient_dnn --help`.
"""
