"""Search a recipe: cheaper than dense, and shown on questions that the search never saw to keep enough of its accuracy.

space.py   what may be tried on this bundle            measure.py  one question under one recipe: right or wrong, and its cost
study.py   the trials, shared and resumable (Optuna)   verdict.py  finalists, their intervals, whether one is recommended
search.py  the loop                                    held_out.py the second look, and the report
written.py the winner as TOML
"""
