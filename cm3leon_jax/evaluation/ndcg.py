"""Normalised discounted cumulative gain, by which Visual Dialog ranks answers."""

import numpy as np


def ndcg(score_NC: np.ndarray, relevance_NC: np.ndarray) -> np.ndarray:
    """Of each row of candidates, float64 [N] in [0, 1].

    As the challenge counts: the first K by score, where K is the number of candidates
    with any relevance, discounted by log2(1 + rank), over what the best order has. Rows
    without relevance are an error.
    """
    score_NC, relevance_NC = np.asarray(score_NC), np.asarray(relevance_NC, float)
    if score_NC.shape != relevance_NC.shape or score_NC.ndim != 2:
        raise ValueError(f"scores {score_NC.shape}, relevance {relevance_NC.shape}")
    if (relevance_NC < 0).any() or not (relevance_NC > 0).any(1).all():
        raise ValueError("every row needs a relevance above 0, and none below")
    discount_C = 1 / np.log2(np.arange(score_NC.shape[1]) + 2)
    within_NC = np.arange(score_NC.shape[1]) < (relevance_NC > 0).sum(1)[:, None]

    def gain(order_NC: np.ndarray) -> np.ndarray:
        sorted_NC = np.take_along_axis(relevance_NC, order_NC, axis=1)
        return (sorted_NC * discount_C * within_NC).sum(1)

    best = gain(np.argsort(-relevance_NC, axis=1, kind="stable"))
    return gain(np.argsort(-score_NC, axis=1, kind="stable")) / best
