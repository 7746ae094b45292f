"""The loss written from its formula in float64 NumPy, entry by entry, with its gradient.

Shares nothing with the package: what the tests of the loss compare with.
"""

import math

import numpy as np

UNIT = 2.0**-24  # rounding of one float32 operation


def logit(similarity, weight, positive, alpha, temperature, margin):
    """A negative's logit relative to the positive's, and its derivatives.

    By the negative's similarity, by the positive's, and by each number of the formula.
    """
    s, p, t = float(similarity), float(positive), temperature
    if margin is None:
        value = (s - p) / t + alpha * weight
        return value, 1 / t, -1 / t, {"alpha": weight, "temperature": -(s - p) / t**2}
    value = (s * (s + margin) - p**2) / t
    return value, (2 * s + margin) / t, -2 * p / t, {"margin": s / t, "temperature": -value / t}


def row_loss(similarity, weight, positive, negatives, alpha, temperature, margin=None):
    """One row's loss, its derivative by the row's similarities and those by the numbers.

    similarity [M] of the logits, weight [M]: the detached similarity in the hardness weight,
    positive: column, negatives: the columns that are negatives, margin: None for hardness weighting,
    else the loss is Focal-InfoNCE's.
    """
    logits = [
        logit(similarity[j], weight[j], similarity[positive], alpha, temperature, margin)
        for j in negatives
    ]
    gradient = np.zeros(len(similarity))
    by_number = {"alpha" if margin is None else "margin": 0.0, "temperature": 0.0}
    if not logits:
        return 0.0, gradient, by_number
    largest = max(0.0, *(value for value, *_ in logits))
    total = math.exp(-largest) + sum(math.exp(value - largest) for value, *_ in logits)
    # log1p where the positive dominates: the loss is then far below 1.
    if largest:
        loss = math.log(total) + largest
    else:
        loss = math.log1p(sum(math.exp(value) for value, *_ in logits))
    for j, (value, by_negative, by_positive, by_numbers) in zip(negatives, logits, strict=True):
        probability = math.exp(value - largest) / total
        gradient[j] += probability * by_negative
        gradient[positive] += probability * by_positive
        for name, derivative in by_numbers.items():
            by_number[name] += probability * derivative
    return loss, gradient, by_number


def rows_loss(similarity, positive, is_negative, alpha, temperature, weight=None, margin=None):
    """Losses [n], derivatives [n, M] (of each row's own loss) and by number, {name: [n]}.

    is_negative: bool [n, M]; temperature: one, or [n].
    """
    similarity = np.asarray(similarity, np.float64)
    weight = similarity if weight is None else weight
    temperature = np.broadcast_to(temperature, len(positive))
    losses, gradients, by_number = [], [], []
    for i, p in enumerate(positive):
        negatives = [j for j in np.flatnonzero(is_negative[i]) if j != p]
        loss, gradient, numbers = row_loss(
            similarity[i], weight[i], p, negatives, alpha, float(temperature[i]), margin
        )
        losses.append(loss)
        gradients.append(gradient)
        by_number.append(numbers)
    by_number = {name: np.array([n[name] for n in by_number]) for name in by_number[0]}
    return np.array(losses), np.array(gradients), by_number


def pool_negatives(
    similarity,
    valid=None,
    ids=None,
    pools=None,
    mask_margin=None,
    owners=None,
    own_only=None,
):
    """Which entries are negatives: bool [N, M] of the rows, and [N, N] of the targets' rows.

    valid, ids, pools, owners: [M]; the first N are those of the pairs. own_only: bool [N].
    """
    size, width = similarity.shape
    valid = np.ones(width, bool) if valid is None else valid
    forth, back = np.zeros((size, width), bool), np.zeros((size, size), bool)
    for i in range(size):
        for j in range(width):
            possible = i != j and valid[i] and valid[j]
            possible &= ids is None or ids[i] != ids[j]
            possible &= pools is None or pools[i] == pools[j]
            # The row of query i, and that of target j.
            in_row = in_column = possible
            if mask_margin is not None:
                in_row &= not similarity[i, j] > similarity[i, i] + mask_margin
                if j < size:
                    in_column &= not similarity[i, j] > similarity[j, j] + mask_margin
            if own_only is not None:
                in_row &= not own_only[i] or (j >= size and owners[j] == i)
                in_column &= j < size and not own_only[j]
            forth[i, j] = in_row
            if j < size:
                back[j, i] = in_column
    return forth, back


def symmetric_loss(
    similarity,
    alpha,
    temperature,
    valid=None,
    ids=None,
    pools=None,
    extra=0,
    weight=None,
    margin=None,
    mask_margin=None,
    owners=None,
    own_only=None,
    hardness_on="all",
):
    """The loss of an [N, N + extra] matrix, its derivative, and those by number, {name: scalar}.

    The last `extra` are no targets. valid: bool [N + extra]; ids [N + extra]: equal ids are not
    negatives of each other; pools [N + extra]: negatives are of the same pool. temperature: one, or [N], and
    so is the derivative by it. owners [N + extra]: the pair to which an extra target belongs; own_only bool [N]:
    pairs without negatives of other pairs; hardness_on: which negatives alpha weighs.
    """
    size, width = similarity.shape
    assert width == size + extra
    valid = np.ones(width, bool) if valid is None else valid
    clean = np.where(valid[:size, None] & valid[None, :], similarity, 0).astype(np.float64)
    forth, back = pool_negatives(clean, valid, ids, pools, mask_margin, owners, own_only)
    weight = clean if weight is None else weight
    is_explicit = np.zeros((size, width), bool)
    if owners is not None:
        is_explicit[:, size:] = owners[size:] == np.arange(size)[:, None]
    weighs = {"all": is_explicit | True, "in_batch": ~is_explicit, "explicit": is_explicit}
    weight = np.where(weighs[hardness_on], weight, 0)
    options = {"alpha": alpha, "temperature": temperature, "margin": margin}
    index = np.arange(size)
    forth, d_forth, n_forth = rows_loss(clean, index, forth, weight=weight, **options)
    square = slice(0, size)
    back, d_back, n_back = rows_loss(
        clean[:, square].T, index, back, weight=weight[:, square].T, **options
    )
    count = max(valid[:size].sum(), 1)
    gradient = d_forth.copy()
    gradient[:, square] += d_back.T
    by_number = {name: (n_forth[name] + n_back[name]) / (2 * count) for name in n_forth}
    for name in by_number.keys() - ({"temperature"} if np.ndim(temperature) else set()):
        by_number[name] = by_number[name].sum()
    return (forth.sum() + back.sum()) / (2 * count), gradient / (2 * count), by_number


def similarity_metrics(similarity, valid=None, extra=0, **rules):
    """What `llave_jax.loss.similarity_metrics` promises; arguments as in `symmetric_loss`."""
    size, width = similarity.shape
    valid = np.ones(width, bool) if valid is None else valid
    clean = np.where(valid[:size, None] & valid[None, :], similarity, 0).astype(np.float64)
    of_rows, of_columns = pool_negatives(clean, valid, **rules)
    positives, hard, easy, forth, back = [], [], [], [], []
    for i in np.flatnonzero(valid[:size]):
        others = np.flatnonzero(of_rows[i])
        positives.append(similarity[i, i])
        if len(others):
            hard.append(similarity[i, others].max())
            easy.append(similarity[i, others].min())
        forth.append(_is_first_maximum(similarity[i], i, others))
        back.append(_is_first_maximum(similarity[:, i], i, np.flatnonzero(of_columns[i])))
    return {
        "positive_similarity": np.mean(positives),
        "hard_negative_similarity": np.mean(hard) if hard else 0,
        "easy_negative_similarity": np.mean(easy) if easy else 0,
        "query_to_target_accuracy": np.mean(forth),
        "target_to_query_accuracy": np.mean(back),
    }


def _is_first_maximum(similarity, positive, others):
    best = max([positive, *others], key=lambda j: (similarity[j], -j))
    return best == positive


def logit_error(alpha, temperature, width, similarity_error=UNIT, margin=None):
    """Bound of the float32 error of a logit relative to the positive's, and of its logsumexp.

    |s| <= 1: a logit is at most 2/t + |alpha|, formed in four roundings and read in two more by the
    logsumexp, whose sum adds one rounding a term; `similarity_error` is that of s itself. With a
    margin m a logit is at most (2 + |m|)/t and moves by (2 + |m|)/t and 2/t with s and p.
    """
    largest = 2 / temperature + abs(alpha)
    slope = largest
    if margin is not None:
        largest, slope = (2 + abs(margin)) / temperature, (4 + abs(margin)) / temperature
    return 8 * UNIT * largest + (width + 8) * UNIT + similarity_error * slope


def assert_close_loss(loss, expected, error):
    """softplus turns an absolute error of its argument into at most the same relative error."""
    np.testing.assert_allclose(loss, expected, rtol=2 * error, atol=1e-30)


def assert_close_gradient(gradient, expected, error):
    """A softmax entry is off by the factor exp(2 * error); all terms of an entry have one sign."""
    np.testing.assert_allclose(gradient, expected, rtol=math.expm1(2 * error), atol=1e-30)
