"""`distml plan`: what a job needs of memory, wires and time, before anything is started; `command.py` is its entry.

flops.py  states.py  wire.py    the formulas               cluster.py  places.py  machine.py   what there is
estimate.py                     a job's plan from both     fit.py   the smallest change that makes it fit
facts.py                        the model, traced (torch)  text.py  a screen            budget.py  many runs
"""
