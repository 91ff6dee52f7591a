"""The lab: grids of runs and what they showed, `python -m mifo_lightning.lab`.

Nothing else in the package imports it; it needs the extra `lab`.
"""
