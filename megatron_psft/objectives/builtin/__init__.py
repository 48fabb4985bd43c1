"""One file per objective: `p_power.py` is `--objective p-power`.

Losses work on any shape, elementwise over label tokens, and on fp32 as on fp64. l is the natural-log probability of a
label, p = exp(l), f its log-probability under the initial model, sg() a factor that carries no gradient.

A file has one function under `@objective` and imports torch in functions only: tensors' own methods need no import.
"""
