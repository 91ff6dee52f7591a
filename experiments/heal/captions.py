"""What stands above each table of the page."""

from experiments.heal.tries import SAMPLES

SWEEP = (
    "Means over bases on test. groups with signal: share of groups of rollouts whose rewards are not all equal; "
    "positive: share of rollouts with a reward above 0; advantage entropy: H = -sum p(a) ln p(a) in nats over the "
    "different advantages of all rollouts, rounded to four decimals: our formula, the paper's is not given. All "
    "three before RL, on training questions."
)

RL = (
    "Means over bases on test, [95 % interval] by t over bases. R = mean(after - start) / mean(peak - start), over "
    "the bases (their number in brackets) whose peak comes before, with a jackknife interval, and only if that "
    "fall exceeds four standard errors over bases. RL that learns the task better heals nothing: the sentence "
    "above says how much more it brings from the end than from the base and the peak. `no update` is RL with a "
    "learning rate of 0, a few steps of it: its difference must be exactly 0, and so R. Arms are of equal RL or "
    "SFT steps, not of equal FLOPs; optimizer steps count those that learn nothing too. The last columns say what "
    "was learned from, of RL and SFT together: where few groups have a signal RL asks more questions and still "
    "trains on few tokens, with AdamW's step of full size."
)

SLOWER = (
    "What a smaller step does without any RL. OOD where the run has the accuracy that the sweep ends with (straight "
    "pieces between its checkpoints, the mean of several such points; the nearest checkpoint where it never has it), "
    "and after all its steps. sweep: the sweep itself before its end, what stopping earlier does. half rate: half of "
    "SFT's learning rate."
)

PROTECTED = (
    "protected: that share of the main directions of every edited matrix stands still on both sides from the base on, "
    "so that the update is orthogonal to them (after the paper's third version, of which we know no details); at "
    "random: as many random directions."
)

TRIES = (
    f"avg@{SAMPLES}: share of right responses of {SAMPLES} at T = 1; pass@{SAMPLES}: of questions right at least "
    "once; greedy: of greedy responses right. The paper counts success within five turns, a verifier's complaint "
    "between them; tries are independent here. On test, means over bases."
)

TURNS = (
    "At k = {k}: means over bases, [95 % interval] of the difference to a random change of the same norm, paired "
    "by base. First over all matrices, then by kind and by third of the layers for what SFT does after the peak, "
    "what RL does from the end, and both together."
)

FLOOR = (
    "Standard deviation of the end over other random draws of its responses; absolute difference to the end of a "
    "run with another seed from the same base."
)

SPECTRA = (
    "Thin SVD in fp64 of the plain weights (norm scales are not multiplied in); means over matrices, then over "
    "bases. ds: singular values paired by rank. Angles in degrees at k: arcsine of the residual below 45, "
    "arccosine above; shares of k are of min(m, n), at most half of it. energy: that of dW in the block of both "
    "top-k subspaces over k^2 / (m n), its expectation for a random dW. no bound: share of matrices in which "
    "|dW|_2 exceeds the gap s_k - s_(k+1), so that the theorems of Davis-Kahan and Wedin bound no angle. Rows "
    "below a pair: W against W in bf16; random changes of the same norm (normal, the same entries permuted, the "
    "same spectrum in random directions); the same steps of a run with another seed."
)

EDITS = (
    "The end with parts of its change since the peak put back, on test. block: the part between both subspaces of "
    "the peak; either: all that touches one of them; rows of a random subspace are means over its seeds (range). "
    "Embedding, head, norms and biases stay the end's unless the name says otherwise. distance: |W - peak| over "
    "the matrices, that of the end being 1. share of the fall: mean(edit - end) / mean(peak - end) in OOD, with a "
    "jackknife interval; it says nothing of what is lost of the trained task, as the next column does. OOD at "
    "equal ...: minus the interpolation of equal accuracy (straight pieces, the highest where several have it; "
    "`not equal`: bases where none has it and the nearest, better in one accuracy and worse in the other, stands "
    "for it), or of equal distance. That interpolation moves the same matrices, or all weights where an edit is of "
    "more than matrices (as published, rollback of everything, of embedding, head, norms, rows); those have no "
    "comparison at equal distance, which counts matrices alone. Random subspaces are of all matrices: an edit of a "
    "third of the layers has none to compare with. `as published` follows the authors' code with its early return, "
    "on everything with two dimensions: U'U is no identity, so its product is no rotation; early: share of "
    "matrices that are simply the peak's."
)

RANDOM = "The peak with its matrices changed: by SFT, and at random by as much per matrix."

REVERSE = (
    "The end plus the part of RL's change of the matrices that lies between the end's own top or tail subspaces "
    "(inside), or plus all the rest (outside); `either`: what touches one of the two. Controls: all of that change "
    "(`rl matrices`), parts of it (`x a`), and random subspaces; a random change has k^2 / (m n) of its energy "
    "inside. minus as much of RL's change: than that part of the whole change which is as long, on straight "
    "pieces. `rl` is RL's model itself, with embedding, head and norms; `rl as published` is the authors' code "
    "with RL's model in the place of SFT's: the end's subspaces in RL's weights."
)
