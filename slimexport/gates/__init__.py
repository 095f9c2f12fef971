"""Gates: bounds on figures of the report, on which a pipeline passes or fails.

declared.py   what a gate is and how it is written, in flags and recipes
figures.py    the figures that there are, with their units
evidence.py   how well a measured figure is known: intervals from the raw record
decide.py     passed, failed or undecided
earlier.py    the report of an earlier run that gates compare with
"""
