"""A package of this code base that has the same name as evalstore's package."""


def greet(name: str) -> str:
    return f"gateway {name}"
