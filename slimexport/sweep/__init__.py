"""Several ratios and precisions of one model: what they cost, what they gain, and which one to take.

points.py      what is run, where, and what came of it
run.py         running it: one after the other, or one on each GPU; goes on where it was stopped
front.py       the Pareto front, and the recommendation for a stated limit
report.py      sweep.json, sweep.md, sweep.html
"""
