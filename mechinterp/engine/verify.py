"""temp"""


def quick_check(model: object) -> None:
    """temp"""
