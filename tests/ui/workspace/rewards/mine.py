def score(completion, target):
    return float(completion == target)


def lonely(text):
    return 0.0


def needs_level(completion, level):
    return 0.0


async def waits(completion):
    return 0.0
