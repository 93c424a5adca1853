"""Export (to come)."""


def export(): ...
