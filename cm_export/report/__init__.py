"""JSON in, HTML out: one page from which a team decides how to deploy a bundle.

points.py    eval and bench reports, checked -> rows           analysis.py  layers, from an instrumented prefill
pareto.py    rows -> front, recommendation                     examples.py  pictures with the kept tokens, and answers
charts.py    rows -> geometry of the drawings                  page.py      all of it -> one file
"""
