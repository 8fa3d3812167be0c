"""A reward whose file cannot be imported."""

import a_package_that_nobody_has


def score(completion):
    return a_package_that_nobody_has.score(completion)
