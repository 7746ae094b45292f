"""The loss written from its formula in float64 NumPy, entry by entry, with its gradient.

Shares nothing with the package: what the tests of the loss compare with.
"""

import math

import numpy as np

UNIT = 2.0**-24  # rounding of one float32 operation


def row_loss(similarity, weight, positive, negatives, alpha, temperature):
    """One row's loss and its derivative by the row's similarities.

    similarity [M] of the logits, weight [M]: the detached similarity in the hardness weight,
    positive: column, negatives: the columns that are negatives.
    """
    ratios = [
        (similarity[j] - similarity[positive]) / temperature + alpha * weight[j] for j in negatives
    ]
    gradient = np.zeros(len(similarity))
    if not ratios:
        return 0.0, gradient
    largest = max(0.0, *ratios)
    total = math.exp(-largest) + sum(math.exp(r - largest) for r in ratios)
    # log1p where the positive dominates: the loss is then far below 1.
    loss = math.log(total) + largest if largest else math.log1p(sum(math.exp(r) for r in ratios))
    for j, ratio in zip(negatives, ratios, strict=True):
        gradient[j] += math.exp(ratio - largest) / total / temperature
    gradient[positive] = -gradient.sum()
    return loss, gradient


def rows_loss(similarity, positive, is_negative, alpha, temperature, weight=None):
    """Losses [n] and derivatives [n, M] (of each row's own loss). is_negative: bool [n, M]."""
    similarity = np.asarray(similarity, np.float64)
    weight = similarity if weight is None else weight
    losses, gradients = [], []
    for i, p in enumerate(positive):
        negatives = [j for j in np.flatnonzero(is_negative[i]) if j != p]
        loss, gradient = row_loss(similarity[i], weight[i], p, negatives, alpha, temperature)
        losses.append(loss)
        gradients.append(gradient)
    return np.array(losses), np.array(gradients)


def symmetric_loss(similarity, alpha, temperature, valid=None, ids=None, extra=0, weight=None):
    """The loss of an [N, N + extra] matrix and its derivative; the last `extra` are no targets.

    valid: bool [N + extra]; ids [N + extra]: equal ids are not negatives of each other.
    """
    size, width = similarity.shape
    assert width == size + extra
    valid = np.ones(width, bool) if valid is None else valid
    is_negative = valid[:size, None] & valid[None, :]
    if ids is not None:
        is_negative &= ids[:size, None] != ids[None, :]
    clean = np.where(valid[:size, None] & valid[None, :], similarity, 0).astype(np.float64)
    weight = clean if weight is None else weight
    options = {"alpha": alpha, "temperature": temperature}
    index = np.arange(size)
    forth, d_forth = rows_loss(clean, index, is_negative, weight=weight, **options)
    square = slice(0, size)
    back, d_back = rows_loss(
        clean[:, square].T, index, is_negative[:, square].T, weight=weight[:, square].T, **options
    )
    count = max(valid[:size].sum(), 1)
    gradient = d_forth.copy()
    gradient[:, square] += d_back.T
    return (forth.sum() + back.sum()) / (2 * count), gradient / (2 * count)


def similarity_metrics(similarity, valid=None, ids=None, extra=0):
    """What `llave_jax.loss.similarity_metrics` promises; arguments as in `symmetric_loss`."""
    size, width = similarity.shape
    valid = np.ones(width, bool) if valid is None else valid
    ids = np.arange(width) if ids is None else ids
    positives, hard, easy, forth, back = [], [], [], [], []
    for i in np.flatnonzero(valid[:size]):
        others = [j for j in np.flatnonzero(valid) if j != i and ids[i] != ids[j]]
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


def logit_error(alpha, temperature, width, similarity_error=UNIT):
    """Bound of the float32 error of a logit relative to the positive's, and of its logsumexp.

    |s| <= 1: a logit is at most 2/t + |alpha|, formed in four roundings and read in two more by the
    logsumexp, whose sum adds one rounding a term; `similarity_error` is that of s itself.
    """
    return (
        8 * UNIT * (2 / temperature + abs(alpha))
        + (width + 8) * UNIT
        + similarity_error * (2 / temperature + abs(alpha))
    )


def assert_close_loss(loss, expected, error):
    """softplus turns an absolute error of its argument into at most the same relative error."""
    np.testing.assert_allclose(loss, expected, rtol=2 * error, atol=1e-30)


def assert_close_gradient(gradient, expected, error):
    """A softmax entry is off by the factor exp(2 * error); all terms of an entry have one sign."""
    np.testing.assert_allclose(gradient, expected, rtol=math.expm1(2 * error), atol=1e-30)
