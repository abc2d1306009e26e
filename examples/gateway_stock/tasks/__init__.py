"""What this code base had long before evalstore: a package with the name that evalstore's has, too."""


def greet(name: str) -> str:
    return f"gateway {name}"
