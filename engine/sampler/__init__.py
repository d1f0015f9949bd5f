"""Logits to tokens: an ordered chain of pure functions over a batch of rows, one row a sequence.

The order. Every step is a no-op at its neutral value, which is in brackets, and rows of a batch differ freely.

1.  repetition_penalty [1], > 0: a token that occurs in prompt or output has its logit divided by the penalty when it is
    positive and multiplied when it is not, once however often the token occurs.
2.  frequency_penalty [0] times the count of the token in the output, and presence_penalty [0] if it is there at all,
    are subtracted.
3.  relative_frequency_penalty [0] times the share of the token in prompt and output is subtracted.
    With penalty_range [0: all] = n, steps 1 to 3 see the last n tokens of prompt and output, and nothing before them;
    with repetition_decay [0] = m, m more of them, each counting less by a 1/m than the one after it.
4.  logit_bias is added, and banned_tokens get a logit of -inf. DRY's penalties are subtracted (dry_multiplier [0]): a
    token that would go on with a stretch of dry_allowed_length or more tokens which stands in prompt and output already
    loses dry_multiplier x dry_base ** (length - dry_allowed_length). no_repeat_ngram_size [0] bans such tokens. Then
    suppressed tokens (ends that may not come yet), and those that a grammar excludes, get a logit of -inf.
5.  The steps of `order`, then those that it doesn't name, as they stand here. Each sees what the steps before it left:

    temperature [1] divides. It is held between 1e-30 and 1e30; 0 is greedy: the token of the largest logit, ties to the
        lowest id, and nothing else of step 5 and 6 happens. dynatemp_range [0] lets it move up and down by so much, to
        the share that the entropy has of its largest possible value, to the power of dynatemp_exponent.
    smoothing [smoothing_factor 0]: logits are reshaped, see reshaping.quadratic.
    top_n_sigma [0]: logits at most so many standard deviations below the largest.
    top_k [0]: the k likeliest tokens; of equals the lowest ids, so that it is exactly k.
    top_p [1]: the smallest set of likeliest tokens whose share of what is left reaches top_p; at least one.
    min_p [0]: tokens at least min_p times as likely as the likeliest.
    typical_p [1]: the smallest set that reaches typical_p, of tokens whose surprisal is nearest the entropy; at least
        one.
    tfs [1]: the likeliest tokens, up to where the curve of probabilities has become straight.
    top_a [0]: tokens of at least top_a times the square of the largest probability.
    epsilon_cutoff [0]: tokens of at least this probability; eta_cutoff [0]: or of less where the entropy is high.
    xtc [xtc_probability 0]: so often, of the tokens of at least xtc_threshold's probability all but the least likely
        are removed. The dice have a stream of their own under the seed.

    min_keep [0]: each step that removes tokens leaves so many, the likeliest of those that it was given.
6.  mirostat_mode [0] keeps tokens of at most `mu` bits of surprise (2), or as many as Zipf's law expects to (1), and
    afterwards corrects mu, which starts at twice mirostat_tau, by mirostat_eta times what was missed. adaptive_target
    [below 0], where mirostat is off, prefers tokens of about that probability, see adaptive.py.
7.  The draw: the kept tokens stand in a row, the likeliest first, equals by id, and one uniform number in [0, 1) falls
    on one of them by its share; skew [0] makes it u ** exp(-skew). The number is a function of (seed, place in the
    output) and of nothing else: neither neighbours in the batch nor rewinding change what a seed says.

Log probabilities are raw (log-softmax of the model's logits) or processed (log of the probability drawn from; for
greedy the log-softmax after step 4). The likeliest tokens beside them: raw exactly as many as asked, of equals the
lowest ids; processed all that tie with the last of them, too. Tokens of no probability are not listed.

A row whose largest logit is not finite (all banned, or a NaN anywhere) draws nothing; its neighbours don't notice.

Logits are float32, and so are steps 1 to 4; what follows is float64 over the largest of them. What is summed over a
whole vocabulary, its mass and entropy and deviation, is made of float32 exponentials: a token within about 1e-5 of an
edge that they decide may fall either way.

How it stays fast: the common parameters are drawn by one kernel, and the others work on a short list of the largest
logits (chain.py), with proof that no other token matters or a longer list. What looks at a whole row is summed in one
pass (transforms.py). Nobody sorts a vocabulary, unless the distribution is truly flat.
"""
