"""Shows the numbers of two programs side by side, and stops where they differ."""

import jax
import numpy as np


def agree(pairs, tolerance=2e-5):
    """Prints what each of two programs computed: the last number, and the largest difference of all.

    Raises:
      AssertionError: two numbers differ by more than the tolerance.
    """
    print(
        f"{'':<28}{'theirs':>11}{'ours':>11}{'largest difference':>20}"
    )
    for what, (theirs, ours) in pairs.items():
        theirs, ours = (
            np.concatenate(
                [
                    np.ravel(np.asarray(leaf, np.float64))
                    for leaf in jax.tree.leaves(side)
                ]
            )
            for side in (theirs, ours)
        )
        np.testing.assert_allclose(
            ours, theirs, rtol=tolerance, atol=tolerance, err_msg=what
        )
        largest = np.abs(ours - theirs).max()
        print(
            f"{what:<28}{theirs[-1]:>11.6f}{ours[-1]:>11.6f}{largest:>20.1e}"
        )
