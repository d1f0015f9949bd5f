"""Logits to tokens: an ordered chain of pure functions over a batch of rows, one row a sequence.

steps.py has the parameters, and the steps in the order in which they run; docs/sampling.md shows them as a table, and
says what seeds, log probabilities and precision mean. Every step does nothing at its neutral value, and rows of a batch
differ freely. A row whose largest logit is not finite (all banned, or a NaN anywhere) draws nothing; its neighbours
don't notice.

Stages 1 to 4 edit the logits in float32 (penalties.py, repeats.py). After them tokens that may not come now, and those
that a grammar excludes, get a logit of -inf. Stages 5 and 6 are float64 over the largest logits (chain.py); 7 is the
draw (draw.py).

How it stays fast: the common parameters are drawn by one kernel, and the others work on a short list of the largest
logits (chain.py), with proof that no other token matters or a longer list. What looks at a whole row is summed in one
pass (transforms.py). Nobody sorts a vocabulary, unless the distribution is truly flat.
"""
