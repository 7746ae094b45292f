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

    is_negative: bool [n, M].
    """
    similarity = np.asarray(similarity, np.float64)
    weight = similarity if weight is None else weight
    losses, gradients, by_number = [], [], []
    for i, p in enumerate(positive):
        negatives = [j for j in np.flatnonzero(is_negative[i]) if j != p]
        loss, gradient, numbers = row_loss(
            similarity[i], weight[i], p, negatives, alpha, temperature, margin
        )
        losses.append(loss)
        gradients.append(gradient)
        by_number.append(numbers)
    by_number = {name: np.array([n[name] for n in by_number]) for name in by_number[0]}
    return np.array(losses), np.array(gradients), by_number


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
):
    """The loss of an [N, N + extra] matrix, its derivative, and those by number, {name: scalar}.

    The last `extra` are no targets. valid: bool [N + extra]; ids [N + extra]: equal ids are not
    negatives of each other; pools [N + extra]: negatives are of the same pool.
    """
    size, width = similarity.shape
    assert width == size + extra
    valid = np.ones(width, bool) if valid is None else valid
    is_negative = valid[:size, None] & valid[None, :]
    if ids is not None:
        is_negative &= ids[:size, None] != ids[None, :]
    if pools is not None:
        is_negative &= pools[:size, None] == pools[None, :]
    clean = np.where(valid[:size, None] & valid[None, :], similarity, 0).astype(np.float64)
    weight = clean if weight is None else weight
    options = {"alpha": alpha, "temperature": temperature, "margin": margin}
    index = np.arange(size)
    forth, d_forth, n_forth = rows_loss(clean, index, is_negative, weight=weight, **options)
    square = slice(0, size)
    back, d_back, n_back = rows_loss(
        clean[:, square].T, index, is_negative[:, square].T, weight=weight[:, square].T, **options
    )
    count = max(valid[:size].sum(), 1)
    gradient = d_forth.copy()
    gradient[:, square] += d_back.T
    by_number = {name: (n_forth[name] + n_back[name]).sum() / (2 * count) for name in n_forth}
    return (forth.sum() + back.sum()) / (2 * count), gradient / (2 * count), by_number


def similarity_metrics(similarity, valid=None, ids=None, pools=None, extra=0):
    """What `llave_jax.loss.similarity_metrics` promises; arguments as in `symmetric_loss`."""
    size, width = similarity.shape
    valid = np.ones(width, bool) if valid is None else valid
    ids = np.arange(width) if ids is None else ids
    pools = np.zeros(width) if pools is None else pools
    positives, hard, easy, forth, back = [], [], [], [], []
    for i in np.flatnonzero(valid[:size]):
        in_pool = np.flatnonzero(valid & (pools == pools[i]))
        others = [j for j in in_pool if j != i and ids[i] != ids[j]]
        positives.append(similarity[i, i])
        if others:
            hard.append(similarity[i, others].max())
            easy.append(similarity[i, others].min())
        forth.append(_is_first_maximum(similarity[i], i, others))
        back.append(_is_first_maximum(similarity[:, i], i, [j for j in others if j < size]))
    return {
        "positive_similarity": np.mean(positives),
        "hard_negative_similarity": np.mean(hard),
        "easy_negative_similarity": np.mean(easy),
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
